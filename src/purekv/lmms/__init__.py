"""A model for lmms-eval: its Qwen2.5-VL, with PureKV around every request.

    python -m lmms_eval --model purekv_qwen2_5_vl \\
      --model_args pretrained=DIR,budget=0.2,scorer=clie --tasks videomme

lmms-eval finds `manifest` by the entry point group `lmms_eval.models`; nothing else imports this.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers; the model itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="purekv_qwen2_5_vl",
        chat_class_path="purekv.lmms.qwen2_5_vl.PureKVQwen25VL",
    )
