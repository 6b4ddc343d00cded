"""What verbs read before they begin: the checkpoint, the videos, the questions, the
processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purekv.cli.progress import step
from purekv.errors import PureKVError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from purekv.actors import Actors
    from purekv.config import PureKVConfig
    from purekv.loading import Checkpoint
    from purekv.media import Clip

SAMPLE = "sample"  # instead of a path: the clip that ships with purekv


def find_checkpoint(model: str | None) -> "Checkpoint":
    """The one that is named, or the embedded reference model's, built on its first use."""
    from purekv.loading import Checkpoint

    if model is None:
        from purekv.reference import default_checkpoint

        with step("preparing the reference model") as progress:
            model = str(default_checkpoint(progress.say))
    return Checkpoint.find(model)


def check_layers(checkpoint: "Checkpoint", configs: "Sequence[PureKVConfig]") -> None:
    """Raises PureKVError for source layers that the model does not have."""
    from purekv.scoring import make_scorer

    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    for config in configs:
        make_scorer(config.scorer, config.source_layers, num_layers)


def video_path(name: str) -> Path:
    from purekv.reference import sample_video

    return sample_video() if name == SAMPLE else Path(name)


def questions_about(videos: Sequence[str], asked: Sequence[str]) -> list[str]:
    """What was asked, or else the sample's own questions."""
    from purekv.reference import sample_questions

    questions = list(asked) or (sample_questions() if SAMPLE in videos else [])
    if not questions or not all(question.strip() for question in questions):
        raise PureKVError('nothing to answer; give --ask "a question"')
    return questions


def read_clips(processor: "ProcessorMixin", paths: Sequence[Path], **sampling: Any) -> "list[Clip]":
    """`sampling`: of `purekv.session.read_clip`."""
    from purekv.session import read_clip

    clips = []
    for path in paths:
        with step(f"decoding {path.name}") as progress:
            clips.append(read_clip(processor, path, progress=progress.advance, **sampling))
    return clips


def find_actors(
    count: int, address: str | None, gpus: float | None, device: str
) -> "tuple[Actors, str]":
    """The processes that were asked for, and their device: "cpu" or "cuda".

    Raises PureKVError for a device that does not fit, or that this machine lacks where it is the
    one to work.
    """
    from purekv.actors import Actors
    from purekv.loading import find_device

    if device.startswith("cuda:"):
        raise PureKVError(f"device={device!r} with actors, among which Ray shares GPUs; write cuda")
    if device == "auto" and gpus:
        device = "cuda"
    if address is None or device != "cuda":  # a cluster may have what this machine lacks
        device = find_device(device).type
    if gpus is None:
        gpus = 1.0 if device == "cuda" else 0.0
    if (gpus > 0) != (device == "cuda"):
        raise PureKVError(
            f"device={device!r} with num_gpus_per_actor={gpus:g}; they contradict each other"
        )
    return Actors(count, address, gpus), device


def from_anywhere(path: str) -> str:
    """The same file or folder where the working directory is another; other names as they are."""
    found = Path(path).expanduser()
    return str(found.absolute()) if found.exists() else path
