"""Loading: which weights are taken, what is refused, and how much memory it takes."""

import dataclasses
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from purekv import PureKVError
from purekv.families.videollama2 import load
from purekv.families.videollama2.beats import BEATsConfig
from purekv.memory import PeakMemory
from tests.videollama2 import checkpoints
from tests.videollama2.checkpoints import KINDS

UNUSED = ("vision_model.head.", "post_layernorm", "encoder.layers.2.", "predictor.")
"""Of a checkpoint's tower of three layers, of which the second's output is looked at."""


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["mistral", "av"])
def test_every_tensor_has_its_place(tmp_path, name, shards):
    model = load(checkpoints.write(tmp_path / "made", name, shards=shards))
    ours = model.state_dict()
    for key, value in checkpoints.tensors(KINDS[name]).items():
        tower = ".vision_tower." in key or "predictor" in key
        copy = "relative_attention_bias" in key and ".0.self_attn" not in key
        if not copy and not (tower and any(part in key for part in UNUSED)):
            assert torch.equal(ours.pop(key), value), key
    assert not ours
    assert not model.training
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.config.rope_parameters["rope_theta"] == 5000.0


def test_dtypes(tmp_path):
    directory = checkpoints.write(tmp_path / "made")
    assert load(directory).dtype == torch.float32  # on the CPU, whatever the config says
    half = load(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    pixels = torch.randn(1, 4, 3, 24, 24)
    made = half.generate(input_ids=torch.tensor([[5, -201, 7]]), pixel_values_videos=pixels,
                         max_new_tokens=2)  # fmt: skip
    assert made.shape == (1, 5)


def tower_weights(directory, seed):
    """A tower's own folder with other weights than the checkpoint's copy."""
    shapes = checkpoints.vision_shapes(KINDS["av"])
    weights = {f"vision_model.{k}": v for k, v in checkpoints.random_tensors(shapes, seed).items()}
    save_file(weights, directory / "siglip-tiny" / "model.safetensors")
    return weights["vision_model.embeddings.patch_embedding.bias"]


@pytest.mark.parametrize(("name", "own"), [("qwen2", False), ("av", True)])
def test_audio_visual_models_take_the_towers_own_weights(tmp_path, name, own):
    """As upstream's two branches do."""
    directory = checkpoints.write(tmp_path / "made", name)
    theirs = tower_weights(directory, seed=9)
    tower = load(directory).model.vision_tower.vision_tower["vision_model"]
    assert torch.equal(tower.embeddings.patch_embedding.bias, theirs) == own


def test_a_checkpoint_without_the_tower_takes_the_folders(tmp_path):
    directory = checkpoints.write(tmp_path / "made", "qwen2", shards=1)
    theirs = tower_weights(directory, seed=9)
    weights = load_file(directory / "model.safetensors")
    rest = {k: v for k, v in weights.items() if ".vision_tower." not in k}
    save_file(rest, directory / "model.safetensors")
    tower = load(directory).model.vision_tower.vision_tower["vision_model"]
    assert torch.equal(tower.embeddings.patch_embedding.bias, theirs)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("place", ["inside", "deeper", "elsewhere"])
def test_the_tower_is_found_by_its_folder(tmp_path, place, flat):
    """With the tower's own config alone, or inside that of the two-tower model."""
    directory = checkpoints.write(tmp_path / "clip-and-more", "qwen2")
    settings = json.loads((directory / "config.json").read_text())
    names = {"inside": "siglip-tiny", "deeper": "towers/siglip", "elsewhere": tmp_path / "siglip"}
    folder = directory / names[place]
    folder.parent.mkdir(exist_ok=True)
    (directory / "siglip-tiny").rename(folder)
    if flat:
        own = json.loads((folder / "config.json").read_text())["vision_config"]
        (folder / "config.json").write_text(json.dumps(own))
    settings["mm_vision_tower"] = str(names[place])
    (directory / "config.json").write_text(json.dumps(settings))
    model = load(directory)
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert model.config.vision_config.hidden_size == checkpoints.VISION


def test_tied_embeddings(tmp_path):
    directory = checkpoints.write(tmp_path / "made", "qwen2", shards=1)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors")
    model = load(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_a_sliding_window_is_never_left(tmp_path):
    """Transformers would build a sliding cache, and attend to less than a kept cache holds."""
    directory = checkpoints.write(tmp_path / "made")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "sliding_window": 20}))
    model = load(directory)
    assert model(input_ids=torch.arange(20)[None]).logits.shape[1] == 20
    with pytest.raises(PureKVError, match="window of 20"):
        model(input_ids=torch.arange(21)[None])
    with pytest.raises(PureKVError, match="21 tokens"):
        model.generate(input_ids=torch.arange(18)[None], min_new_tokens=5, max_new_tokens=5)


def test_beats_sizes_are_read_off_the_shapes(tmp_path):
    prefix = "model.audio_tower."
    shapes = {
        key.removeprefix(prefix): value
        for key, value in checkpoints.audio_shapes().items()
        if key.startswith(prefix)
    }
    sizes = BEATsConfig.from_shapes(shapes, max_distance=12)
    assert dataclasses.astuple(sizes) == (16, 24, 32, 40, 2, 4, 8, 4, 32, 12)
    assert BEATsConfig.from_shapes(shapes).max_distance == 800
    directory = checkpoints.write(tmp_path / "made", "av")
    with pytest.raises(PureKVError, match="unknown beats setting depth"):
        load(directory, beats={"depth": 2})
    assert load(directory, {"max_distance": 12}).model.audio_tower.encoder.max_distance == 12


def spoil(directory, how):
    config = json.loads((directory / "config.json").read_text())
    shard = min(directory.glob("*.safetensors"))
    if how in ("pickles", "no weights"):
        for path in directory.glob("model*"):
            path.unlink()
        if how == "pickles":
            torch.save({}, directory / "pytorch_model-00001-of-00002.bin")
    elif how == "no shard":
        shard.unlink()
    elif how == "broken shard":
        shard.write_bytes(b"broken")
    elif how == "no tower":
        (directory / "clip-tiny" / "config.json").unlink()
    elif how == "no config":
        (directory / "config.json").unlink()
    elif how == "lacks a tensor":
        weights = load_file(shard)
        del weights["lm_head.weight"], weights["model.norm.weight"]
        save_file(weights, shard)
    elif how == "other shape":
        weights = load_file(shard)
        weights["lm_head.weight"] = torch.zeros(3, 3)
        save_file(weights, shard)
    else:
        (directory / "config.json").write_text(json.dumps({**config, **how}))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("pickles", "only pickles.*safetensors"),
        ("no weights", "no weights"),
        ("no shard", "lacks model-00001"),
        ("broken shard", "is broken"),
        ("no tower", "vision tower 'clip-tiny'"),
        ("no config", "no config.json"),
        ("lacks a tensor", "lacks . tensors"),
        ("other shape", "config.json makes it"),
        ({"mm_projector_type": "spatial_conv"}, "supported are stc_connector"),
        ({"mm_vision_tower": "eva"}, "CLIP and SigLIP are"),
        ({"mm_vision_select_feature": "cls_patch"}, "only patch"),
        ({"model_type": "llava"}, "not VideoLLaMA2's"),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_loaded_names_the_fix(tmp_path, how, names):
    shards = 1 if how in ("lacks a tensor", "other shape") else 3
    directory = checkpoints.write(tmp_path / "made", shards=shards)
    spoil(directory, how)
    with pytest.raises(PureKVError, match=names):
        load(directory)


def peak_of_loading(small: Path, large: Path) -> tuple[int, int]:
    """Bytes that loading `large` adds to the resident set at its worst, and those of its model."""
    load(small)  # whatever is imported on the way
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as peak:
        model = load(large)
    return peak.bytes - before.bytes, sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are Linux's")
def test_loading_holds_the_model_and_one_shard(tmp_path):
    """In a process of its own, where the allocator holds nothing that earlier tests have freed."""
    wide = 30_000
    directory = checkpoints.write(tmp_path / "large", "av", shards=1)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "intermediate_size": wide}))
    weights = checkpoints.tensors(KINDS["av"])
    for key, value in weights.items():
        if ".layers." in key and ".mlp." in key and "vision" not in key and "audio" not in key:
            weights[key] = torch.zeros([wide if n == checkpoints.MLP else n for n in value.shape])
    (directory / "model.safetensors").unlink()
    checkpoints.save(directory, weights, shards=7)
    shards = [path.stat().st_size for path in directory.glob("model-*.safetensors")]
    small = checkpoints.write(tmp_path / "small", "av")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        took, size = pool.submit(peak_of_loading, small, directory).result()
    assert size > 60 * 2**20
    assert max(shards) < size / 4  # so that holding all of them would show
    assert took < size + max(shards) + 8 * 2**20
