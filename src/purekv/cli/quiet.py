"""Other libraries' chatter, off: stderr is for our progress and errors."""

import warnings


def quiet() -> None:
    import huggingface_hub
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
