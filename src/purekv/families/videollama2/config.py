"""What a VideoLLaMA2 checkpoint says of itself: config.json, and the vision tower's own."""

import json
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from purekv.errors import PureKVError

SAMPLER_PADDING = {"stc_connector": 1, "stc_connector_v35": 0}
"""Zeros around time, height and width of what the connector samples by two, by
`mm_projector_type`."""

VISION_CONFIGS = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}
"""By the word in a tower's name or model type."""

MEL_BINS = 128
DEFAULT_FRAMES = 8
"""Sampled from a video where config.json does not say how many."""


class VideoLLaMA2Config(MistralConfig):
    model_type = "videollama2"


class VideoLLaMA2MistralConfig(MistralConfig):
    model_type = "videollama2_mistral"


class VideoLLaMA2MixtralConfig(MixtralConfig):
    model_type = "videollama2_mixtral"


class VideoLLaMA2Qwen2Config(Qwen2Config):
    model_type = "videollama2_qwen2"


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config
    for config in (
        VideoLLaMA2Config,
        VideoLLaMA2MistralConfig,
        VideoLLaMA2MixtralConfig,
        VideoLLaMA2Qwen2Config,
    )
}


def read_config(directory: str | Path) -> Any:
    """The language model's config with upstream's `mm_*` settings, and `vision_config`.

    Raises:
        PureKVError: not a VideoLLaMA2 checkpoint, or of a kind that is not implemented.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise PureKVError(f"{directory} has no config.json; give a checkpoint directory")
    settings = json.loads(path.read_text())
    model_type = settings.get("model_type")
    if model_type not in CONFIGS:
        raise PureKVError(
            f"model type {model_type!r} of {directory} is not VideoLLaMA2's; those are "
            f"{', '.join(CONFIGS)}"
        )
    config: Any = CONFIGS[model_type].from_dict(settings)
    connector = getattr(config, "mm_projector_type", None)
    if connector not in SAMPLER_PADDING:
        raise PureKVError(
            f"mm_projector_type={connector!r} is not supported; supported are "
            f"{', '.join(SAMPLER_PADDING)}"
        )
    feature = getattr(config, "mm_vision_select_feature", "patch")
    if feature != "patch":
        raise PureKVError(f"mm_vision_select_feature={feature!r} is not supported; only patch is")
    config.longest_prompt = None
    if model_type != VideoLLaMA2Qwen2Config.model_type:
        # Released checkpoints have no window. One that has attends to all within it, and the model
        # refuses to leave it.
        config.longest_prompt, config.sliding_window = config.sliding_window, None
    config.vision_config = _vision_config(config, directory)
    config.audio_patch_size = 16
    config.num_frames = getattr(config, "num_frames", None) or DEFAULT_FRAMES
    return config


def vision_tower_path(config: Any, directory: str | Path) -> str:
    """Where `mm_vision_tower` is: inside the checkpoint, elsewhere on this machine, or on the
    hub."""
    name = config.mm_vision_tower
    inside = Path(directory) / name
    return str(inside) if inside.is_dir() else name


def _vision_config(config: Any, directory: str | Path) -> Any:
    name = str(getattr(config, "mm_vision_tower", None))
    path = vision_tower_path(config, directory)
    try:
        kind = _tower_kind(name, Path(path))
        return VISION_CONFIGS[kind].from_pretrained(path)
    except (OSError, ValueError) as error:
        if isinstance(error, PureKVError):
            raise
        raise PureKVError(
            f"cannot read the config of the vision tower {name!r}; put that folder (config.json "
            f"and preprocessor_config.json) inside {directory}"
        ) from error


def _tower_kind(name: str, folder: Path) -> str:
    """What the tower's folder says it is; of one on the hub, its name."""
    if folder.is_dir():
        name = json.loads((folder / "config.json").read_text()).get("model_type", name)
    for kind in VISION_CONFIGS:
        if kind in name.lower():
            return kind
    raise PureKVError(f"the vision tower {name!r} is not supported; CLIP and SigLIP are")


def video_grid(config: Any, num_frames: int) -> tuple[int, int, int]:
    """The connector's tokens of a video in time, height and width."""
    padding = SAMPLER_PADDING[config.mm_projector_type]
    side = config.vision_config.image_size // config.vision_config.patch_size
    time, height, width = ((size + 2 * padding) // 2 for size in (num_frames, side, side))
    return time, height, width


def audio_grid(config: Any, num_rows: int) -> tuple[int, int, int]:
    """BEATs' tokens of a filter bank of that many rows: one picture of time and frequency."""
    patch = config.audio_patch_size
    return 1, num_rows // patch, MEL_BINS // patch


def has_audio(config: Any) -> bool:
    return getattr(config, "mm_audio_tower", None) is not None
