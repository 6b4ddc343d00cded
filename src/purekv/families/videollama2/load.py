"""Official checkpoints to models, one tensor after another.

The model is built without memory; each tensor is read from its shard, given its dtype and put in
its place, so that loading holds the model and at most one shard.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig

from purekv.errors import PureKVError
from purekv.families.videollama2.beats import BEATsConfig
from purekv.families.videollama2.config import has_audio, read_config, vision_tower_path

AUDIO_TOWER = "model.audio_tower."
VISION_TOWER = "model.vision_tower.vision_tower.vision_model."


def load(
    checkpoint_dir: str | Path,
    beats: Mapping[str, int] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """A VideoLLaMA2 model for inference.

    Args:
        checkpoint_dir: config.json, safetensors, and the folder that `mm_vision_tower` names
            (unless that is elsewhere).
        beats: sizes of the audio tower in the place of those that its tensors' shapes say:
            `{"max_distance": 800}`, which they do not.
        device: where the weights go.
        dtype: None: float32 on the CPU, the config's elsewhere.

    Raises:
        PureKVError: the checkpoint is incomplete, or has only pickles.
    """
    from purekv.families.videollama2.model import MODELS

    directory, device = Path(checkpoint_dir).expanduser(), torch.device(device)
    config = read_config(directory)
    shards = find_shards(directory)
    config.dtype = dtype or _own_dtype(config, device)
    sizes = None
    if has_audio(config):
        sizes = BEATsConfig.from_shapes(_shapes(shards, AUDIO_TOWER), **(beats or {}))
        config.audio_patch_size = sizes.patch_size
    with torch.device("meta"):
        model = MODELS[config.model_type](config, sizes)

    tower = Path(vision_tower_path(config, directory))
    # Upstream takes the tower of an audio-visual model from its own folder, others from here.
    if has_audio(config):
        _fill_vision_tower(model, tower, device)
    _fill(model, shards, device)
    if _unfilled(model, VISION_TOWER):
        _fill_vision_tower(model, tower, device)
    _make_buffers(model, device)
    model.tie_weights()
    if missing := _unfilled(model):
        raise PureKVError(
            f"{directory} lacks {len(missing)} tensors of its model, such as {missing[0]}; "
            "download it again"
        )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        PureKVError: there are none, or one that the index names is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise PureKVError(f"{directory} lacks {', '.join(missing)}; download it again")
        return [directory / name for name in names]
    if found := sorted(directory.glob("*.safetensors")):
        return found
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind))
    if pickles:
        raise PureKVError(
            f"{directory} has only pickles ({pickles[0]}), which can run code when read; convert "
            "them where you trust them: save_file({name: tensor.clone() for name, tensor in "
            "torch.load(file, weights_only=True).items()}, 'model.safetensors') with "
            "safetensors.torch"
        )
    raise PureKVError(f"{directory} has no weights; put model.safetensors or its shards there")


def _own_dtype(config: Any, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16


def _shapes(shards: list[Path], prefix: str) -> dict[str, list[int]]:
    """Shapes of the tensors with that prefix, without it."""
    shapes = {}
    for shard in shards:
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                if name.startswith(prefix):
                    shapes[name.removeprefix(prefix)] = file.get_slice(name).get_shape()
    return shapes


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, "pt")
    except SafetensorError as error:
        raise PureKVError(f"{shard} is broken ({error}); download it again") from error


def _fill(
    model: nn.Module,
    shards: list[Path],
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Give parameters that have no memory yet their values; what the model lacks is skipped."""
    dtype: torch.dtype = model.config.dtype
    for shard in shards:
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                place = _empty_parameter(model, rename(name))
                if place is None:
                    continue
                module, leaf, empty = place
                tensor = file.get_tensor(name)
                if tensor.shape != empty.shape:
                    raise PureKVError(
                        f"{name} in {shard} is {tuple(tensor.shape)} and config.json makes it "
                        f"{tuple(empty.shape)}; download the checkpoint again"
                    )
                # A copy, or it would stay a view of the mapped file.
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True)))


def _empty_parameter(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter] | None:
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    parameter = module._parameters.get(leaf)
    return (module, leaf, parameter) if parameter is not None and parameter.is_meta else None


def _fill_vision_tower(model: nn.Module, folder: Path, device: torch.device) -> None:
    """From the tower's own folder, if that has safetensors."""
    if any(folder.glob("*.safetensors")):
        _fill(
            model,
            find_shards(folder),
            device,
            lambda name: VISION_TOWER + name.removeprefix("vision_model."),
        )


def _unfilled(model: nn.Module, prefix: str = "") -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and name.startswith(prefix)
    ]


def _make_buffers(model: Any, device: torch.device) -> None:
    """Buffers that follow from the config and are in no checkpoint."""
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
    embeddings = decoder.vision_tower.vision_tower["vision_model"].embeddings
    positions = torch.arange(embeddings.num_positions, device=device)
    embeddings.position_ids = positions.expand(1, -1)
    assert not any(buffer.is_meta for buffer in model.buffers())
