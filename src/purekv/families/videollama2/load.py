"""Official checkpoints to models, one tensor after another.

The model is built without memory; each tensor is read from its shard, given its dtype and put in
its place, so that loading holds the model and at most one shard.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from purekv.errors import PureKVError
from purekv.families.videollama2.beats import BEATsConfig
from purekv.families.videollama2.config import has_audio, read_config, vision_tower_path
from purekv.families.videollama2.experts import Place, expert_place

AUDIO_TOWER = "model.audio_tower."
VISION_TOWER = "model.vision_tower.vision_tower.vision_model."


def load(
    checkpoint_dir: str | Path,
    beats: Mapping[str, int] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """A VideoLLaMA2 model for inference: its parameters take no gradient.

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

    filling = Filling(model, device, config.dtype)
    tower = Path(vision_tower_path(config, directory))
    own_weights = any(tower.glob("*.safetensors"))
    # Upstream takes the tower of an audio-visual model from its own folder, others from here.
    if has_audio(config) and own_weights:
        filling.fill(find_shards(tower), _vision_tower_name)
    filling.fill(shards)
    if filling.missing(VISION_TOWER) and own_weights:
        filling.fill(find_shards(tower), _vision_tower_name)
    _make_buffers(model, device)
    model.tie_weights()
    if missing := filling.missing():
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
    pickles = sorted(
        path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind)
    )
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


class Filling:
    """Gives the parameters of a model without memory their values, one tensor at a time."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._parameters = dict(model.named_parameters())
        self._filled: Counter[str] = Counter()  # elements

    def fill(self, shards: list[Path], rename: Callable[[str], str] = str) -> None:
        """What is filled already stays; tensors that the model lacks are skipped."""
        filled_before = set(self._filled)
        for shard in shards:
            with _opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    target, place = expert_place(rename(name))
                    if target in self._parameters and target not in filled_before:
                        self._fill_one(target, place, file.get_tensor(name), f"{name} in {shard}")

    def _fill_one(self, target: str, place: Place, tensor: Tensor, source: str) -> None:
        parameter = self._parameters[target]
        if parameter.is_meta:
            parent, _, leaf = target.rpartition(".")
            memory = torch.empty(parameter.shape, device=self._device, dtype=self._dtype)
            parameter = self._parameters[target] = nn.Parameter(memory, requires_grad=False)
            setattr(self._model.get_submodule(parent), leaf, parameter)
        part = place(parameter.data)
        if part.shape != tensor.shape:
            raise PureKVError(
                f"{source} is {tuple(tensor.shape)} and config.json makes it {tuple(part.shape)}; "
                "download the checkpoint again"
            )
        part.copy_(tensor)
        self._filled[target] += tensor.numel()

    def missing(self, prefix: str = "") -> list[str]:
        """Parameters without a value, or with a part of it; tied ones share that of another."""
        return [
            name
            for name, parameter in self._model.named_parameters()
            if name.startswith(prefix) and self._filled[name] < parameter.numel()
        ]


def _vision_tower_name(name: str) -> str:
    """Of a tensor in the tower's own folder."""
    return VISION_TOWER + name.removeprefix("vision_model.")


def _make_buffers(model: Any, device: torch.device) -> None:
    """Buffers that follow from the config and are in no checkpoint."""
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
    embeddings = decoder.vision_tower.vision_tower["vision_model"].embeddings
    positions = torch.arange(embeddings.num_positions, device=device)
    embeddings.position_ids = positions.expand(1, -1)
    assert not any(buffer.is_meta for buffer in model.buffers())
