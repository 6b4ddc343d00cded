"""The trainer: its batched arithmetic against the stock modules, and its commands."""

from __future__ import annotations

import json
import sys
from multiprocessing import Value
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import language
import state
import stream
import tower
import train_reference

from purekv.reference.data import FIRST_SEED, Geometry, image, page, video
from purekv.reference.gguf import llama_weights, read_gguf
from purekv.reference.model import (
    WEIGHTS,
    build,
    find_gguf,
    make_config,
    merge_lora,
    sizes,
    wrap_tokenizer,
)
from purekv.reference.questions import CATEGORIES, chat
from purekv.reference.render import Renderer
from purekv.reference.scene import LEVELS
from tests.processes import run

MODELS = train_reference.MODELS
TRAINING = Path(train_reference.__file__).parent


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return stream.tokenizer_json(find_gguf())


# Arithmetic


@pytest.mark.parametrize("frames", [4, 1])
def test_patchify_is_the_processors(frames: int) -> None:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = torch.randint(0, 256, (frames, 168, 168, 3), dtype=torch.uint8)
    settings = {"do_resize": False, "patch_size": 14, "merge_size": 2}
    if frames > 1:
        stock = Qwen2VLVideoProcessor(do_sample_frames=False, **settings)
        expected = stock([pixels.permute(0, 3, 1, 2)], return_tensors="pt")["pixel_values_videos"]
    else:
        stock = Qwen2VLImageProcessor(**settings)
        expected = stock([pixels[0].permute(2, 0, 1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        tower.patchify(pixels[None]).flatten(0, 1), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", [6, 9])
def test_tower_is_the_stock_one(grid: int, name: str) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    model = MODELS[name]
    weights = tower.init_tower(torch.Generator().manual_seed(0), model.depth)
    config = make_config(model.depth, model.layers).vision_config
    stock = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    stock.load_state_dict(weights)
    assert tower.tower_depth(weights) == model.depth
    patches = torch.randn(3, 4 * grid * grid, 1176)
    with torch.no_grad():
        where = torch.tensor([[3, 2 * grid, 2 * grid]])
        expected = stock(patches.flatten(0, 1), grid_thw=where).pooler_output
        found = tower.tower(weights, patches, *tower.rope_tables(grid, torch.device("cpu")))
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-4, rtol=0)


def stock_positions(
    model: torch.nn.Module, ids: torch.Tensor, patches: int, grid: int, count: int, kind: str
) -> torch.Tensor:
    """Where the stock model places a prompt of `count` videos or images, [3, B, S]."""
    where = torch.tensor([[patches, 2 * grid, 2 * grid]] * (count * len(ids)))
    grids = {f"{kind}_grid_thw": where}
    if kind == "video":
        grids["second_per_grid_ts"] = torch.ones(len(where))
    pad = {"video": 13, "image": 14}[kind]
    kinds = (ids == pad).int() * {"video": 2, "image": 1}[kind]
    return model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "patches", "grid", "count"),
    [
        ("video", 3, 6, 1), ("video", 9, 6, 1), ("video", 3, 6, 2), ("video", 8, 6, 3),
        ("image", 1, 6, 1), ("image", 1, 6, 4),
    ],
)  # fmt: skip
def test_language_is_the_stock_one(
    name: str, kind: str, patches: int, grid: int, count: int
) -> None:
    """All of a prompt: rope tables, low-rank updates and every layer up to the second."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    layers = 2  # of the model's: all have the same arithmetic
    config = make_config(MODELS[name].depth, MODELS[name].layers)
    assert config.text_config.num_hidden_layers == MODELS[name].layers
    config.text_config.num_hidden_layers = layers
    if "layer_types" in config.text_config.to_dict():
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.vision_config.depth = 1  # not asked here
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    lora = language.init_lora(generator, layers, MODELS[name].rank)
    lora = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in lora.items()}
    weights = language.random_base(generator, layers)
    base = language.stack_base(weights, layers, torch.device("cpu"), torch.float32)
    # What `build` does to the checkpoint's weights is what the trainer learnt with.
    merged = {key: value.numpy().copy() for key, value in weights.items()}
    merge_lora(merged, {key: value.numpy() for key, value in lora.items()})
    state = model.state_dict()
    for key, value in merged.items():
        state[f"model.language_model.{key}"] = torch.from_numpy(value)
    state["lm_head.weight"] = weights["embed_tokens.weight"]
    for key in state:
        if key.endswith("proj.bias") and "language_model" in key:
            state[key] = torch.zeros_like(state[key])
    model.load_state_dict(state)
    prefix, between, tail, visual = 4, 2, 20, patches * grid * grid
    ids, places = [*[20] * (prefix - 1), 11], []
    for k in range(count):
        ids += [12, 11] if k else []
        places += range(len(ids), len(ids) + visual)
        ids += [{"video": 13, "image": 14}[kind]] * visual
    ids = torch.tensor([[*ids, 12, *range(30, 29 + tail)]] * 2)
    positions = stock_positions(model, ids, patches, grid, count, kind)
    embeds = model.get_input_embeddings()(ids)
    embeds[:, places] = torch.randn(2, len(places), 576, generator=generator) * 0.1
    with torch.no_grad():
        expected = model.model.language_model(inputs_embeds=embeds, position_ids=positions)
        device = torch.device("cpu")
        tables = language.rope_tables(prefix, patches, grid, count, between, tail, device)
        found = language.language(language.effective(base, lora), base["norm"], embeds, *tables)
    torch.testing.assert_close(found, expected.last_hidden_state, atol=1e-3, rtol=1e-3)


# What workers send


@pytest.mark.parametrize("geometry", [video(4, 6), video(4, 6, 2), image(6, 3), page(10)], ids=str)
def test_answers_are_where_the_stock_prompt_has_them(tokenizer: str, geometry: Geometry) -> None:
    """The tail of a training chat is the chat template's, and the targets are its replies."""
    stock = wrap_tokenizer(read_gguf(find_gguf())[0])
    speech = stream.Speech(tokenizer)
    shape = stream.Shape(geometry, "hard")
    scenes, chats = [], []
    for index in range(3):
        drawn = stream.draw(1, index, geometry, shape.level)
        scenes += drawn
        turns = chat(drawn, np.random.default_rng(index), 5, shape.level, geometry.media, 0.5)
        chats.append(turns)
    batch = stream.collate(shape, scenes, chats, speech)
    kind = "video" if geometry.media.startswith("video") else "image"
    pad = speech.pads[kind]
    replies: list[list[int]] = [[] for _ in batch.category]
    for place, target, turn in zip(batch.where, batch.target, batch.turn, strict=True):
        assert batch.tail.flatten()[place + 1] == target
        replies[turn].append(int(target))
    flat = [turn for turns in chats for turn in turns]
    assert [CATEGORIES[k] for k in batch.category] == [turn.category for turn in flat]
    assert [stock.decode(ids) for ids in replies] == [f"{t.reply}<|im_end|>" for t in flat]
    for row, turns in zip(batch.tail, chats, strict=True):
        media = [{"type": kind}] * geometry.count
        messages: list[dict] = []
        for turn in turns:
            content = [*([] if messages else media), {"type": "text", "text": turn.prompt}]
            messages += [
                {"role": "user", "content": content}, {"role": "assistant", "content": turn.reply}
            ]  # fmt: skip
        expected = stock(stock.apply_chat_template(messages, tokenize=False))["input_ids"]
        ids = list(speech.prefix)
        for k in range(geometry.count):
            ids += [*(speech.between if k else []), pad]
        assert (ids + row.tolist())[: len(expected)] == expected
        assert not row[len(expected) - len(ids) :].any()


def test_a_stream_goes_through_the_shapes_of_its_phase(tokenizer: str) -> None:
    shapes = [stream.Shape(video(3, 6)), stream.Shape(page(8), "hard"), stream.Shape(image(6, 2))]
    phase = Value("i", 0)
    batches = stream.stream([shapes, shapes[:1]], phase, 2000, 4, 0.3, 1, tokenizer, 0)
    seen = [next(batches) for _ in range(12)]
    assert {batch.shape for batch in seen} == set(shapes)
    for batch in seen:
        assert len(batch.packed.kinds) == len(batch.tail) * batch.shape.geometry.count
        assert len(batch.where) == len(batch.target) == len(batch.turn)
    phase.value = 1
    assert {next(batches).shape for _ in range(6)} == {shapes[0]}


def test_held_out_questions_are_a_data_sets(tokenizer: str) -> None:
    """Of a seed that no training stream can have."""
    shape = stream.Shape(video(4, 6))
    found = list(stream.held_out(shape, 10, 4, 77, tokenizer))
    assert [len(batch.tail) for batch, _ in found] == [4, 4, 2]
    assert all(len(turns) == 2 for _, chats in found for turns in chats)
    with pytest.raises(AssertionError):
        stream.stream([[shape]], Value("i", 0), 2000, 4, 0.3, FIRST_SEED, tokenizer, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_every_training_shape_can_be_drawn(level: str) -> None:
    phases = [
        *train_reference.TOWER_PHASES,
        *(shapes for _, shapes in train_reference.ANSWER_PHASES),
    ]
    for shape in {shape for shapes in phases for shape in shapes}:
        drawn = stream.draw(1, 0, shape.geometry, level)
        assert chat(drawn, np.random.default_rng(0), 5, level, shape.geometry.media)


# Files


def test_training_goes_on_from_its_state_and_from_shipped_weights(tmp_path: Path) -> None:
    groups = {"tower": {"blocks.0.w": torch.randn(3, 2)}, "lora": {"q.a": torch.randn(2, 2)}}
    parameters = [value.requires_grad_() for group in groups.values() for value in group.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    state.save_state(tmp_path / "state.safetensors", groups, optimizer, "answers")
    loaded, moments, stage = state.load_state(tmp_path / "state.safetensors")
    assert stage == "answers"
    for name, group in groups.items():
        for key, value in group.items():
            assert torch.equal(loaded[name][key], value)
    again = torch.optim.AdamW(parameters)
    again.load_state_dict({"state": moments, "param_groups": again.state_dict()["param_groups"]})
    for number, expected in optimizer.state_dict()["state"].items():
        for key, value in expected.items():
            assert torch.equal(again.state_dict()["state"][number][key], value)
    shipped, moments, stage = state.load_state(WEIGHTS)
    assert set(shipped) == {"tower", "lora"}
    assert (moments, stage) == ({}, "")


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_a_model_is_read_from_its_weights(name: str) -> None:
    model, generator = MODELS[name], torch.Generator().manual_seed(0)
    lora = language.init_lora(generator, model.layers, 1)
    trained = {"tower": tower.init_tower(generator, model.depth), "lora": lora}
    assert sizes(trained) == (model.depth, model.layers)


@pytest.mark.parametrize(("depth", "layers"), [(3, 4), (1, 2)])
def test_what_training_writes_becomes_a_checkpoint(tmp_path: Path, depth: int, layers: int) -> None:
    """Of any depth: the first layers stay, each with its own update."""
    from transformers import AutoModelForImageTextToText

    generator = torch.Generator().manual_seed(0)
    seen = tower.init_tower(generator, depth)
    lora = language.init_lora(generator, layers, 2)
    lora = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in lora.items()}
    save_file(seen, tmp_path / "tower-1.safetensors")
    save_file(lora, tmp_path / "lora-1.safetensors")
    built = build(tmp_path / "model", weights=tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(built, dtype=torch.float32)
    config = model.config
    assert config.vision_config.depth == len(model.model.visual.blocks) == depth
    assert config.vision_config.fullatt_block_indexes == list(range(depth))
    assert len(model.model.language_model.layers) == layers
    base = llama_weights(read_gguf(find_gguf())[1], 9, 3)
    for k in range(layers):
        for name in ("mlp.down_proj", "self_attn.k_proj"):
            update = lora[f"{name}.b"][k] @ lora[f"{name}.a"][k]
            expected = torch.from_numpy(base[f"layers.{k}.{name}.weight"]) + update
            found = model.get_submodule(f"model.language_model.layers.{k}.{name}").weight
            torch.testing.assert_close(found, expected.bfloat16().float())
    found = model.model.visual.blocks[depth - 1].mlp.down_proj.weight
    expected = seen[f"blocks.{depth - 1}.mlp.down_proj.weight"]
    torch.testing.assert_close(found, expected.bfloat16().float())


# The commands of training/README.md, on a few small batches

DRIVER = """\
import sys
sys.path.insert(0, {training!r})
import train_reference as t
from purekv.reference.data import image, page, video
small = [t.Shape(video(3, 6)), t.Shape(page(8)), t.Shape(image(6, 2)), t.Shape(video(3, 6, 2))]
t.MODELS["first"] = t.Model(1, 2, 2)
t.TOWER_PHASES = [small]
t.ANSWER_PHASES = [(0.5, small), (1.0, small)]
t.EVALUATED = [(shape, 4) for shape in small]
t.main()
"""


def train(stage: str, folder: Path, *options: object) -> list[dict]:
    """Runs a stage in a process of its own, on tiny models, and returns its log."""
    command = [
        sys.executable, "-c", DRIVER.format(training=str(TRAINING)), stage, "--device", "cpu",
        "--dtype", "float32", "--eager", "--workers", "0", "--budget", "600", "--turns", "3",
        "--abort-at", "0", "--save", folder / f"{stage}.safetensors", "--out", folder / stage,
        *options,
    ]  # fmt: skip
    done = run(command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / stage / f"{stage}.jsonl").open()]


def test_the_commands_run_to_the_end(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    words = ("--tokenizer", tmp_path / "tokenizer.json")
    log = train("tower", tmp_path, "--seconds", "2")
    assert [line["event"] for line in log if "event" in line] == ["ready", "done"]
    assert log[-1]["steps"] >= 1  # more on a machine that has time
    first = load_file(tmp_path / "tower.safetensors")
    log = train(
        "answers", tmp_path, "--seconds", "3", "--state", tmp_path / "tower.safetensors",
        "--emphasis", "count=3,half=2", "--favour", "images=6", *words,
    )  # fmt: skip
    events = [line["event"] for line in log if "event" in line]
    assert events == ["ready", "done", *["held-out"] * 8]
    done = next(line for line in log if line.get("event") == "done")
    assert done["steps"] >= 1
    second = load_file(tmp_path / "answers.safetensors")
    name = "tower/patch_embed.proj.weight"
    assert first[name].shape == second[name].shape
    assert not torch.equal(first[name], second[name])
    assert second["lora/self_attn.q_proj.b"].any()  # updates begin at zero
    # The folder holds what `build` takes, and training goes on from it.
    names = sorted(path.name for path in (tmp_path / "answers").glob("*.safetensors"))
    assert names == [f"{kind}-{k}.safetensors" for kind in ("lora", "tower") for k in (1, 2)]
    assert sizes(state.load_state(tmp_path / "answers")[0]) == (1, 2)
    log = train("evaluate", tmp_path, "--state", tmp_path / "answers", *words)
    held_out = [line for line in log if line.get("event") == "held-out"]
    assert len(held_out) == 8
    assert all(line["n"] == 4 for line in held_out)


def test_the_labels_of_tokens_cost_nothing_where_there_are_none(tmp_path: Path) -> None:
    """Pages have no things, images no motion: the loss stays finite and has a gradient."""
    batches = stream.stream(
        [[stream.Shape(page(8)), stream.Shape(image(6))]], Value("i", 0), 400, 0, 0.0, 1, "", 0
    )
    run = train_reference.Run.__new__(train_reference.Run)
    run.device, run.dtype, run.renderer = torch.device("cpu"), torch.float32, Renderer()
    run.heads = {}
    for name, size in train_reference.HEADS.items():
        run.heads[f"{name}.weight"] = torch.zeros(size, 576)
        run.heads[f"{name}.bias"] = torch.zeros(size)
    for _ in range(6):
        batch = next(batches)
        _, owners = run.renderer.render(batch.packed)
        seen = torch.randn(len(batch.packed.kinds), batch.shape.geometry.grid**2, 576)
        loss, accuracy = run.label_loss(batch, seen.requires_grad_(), owners)
        assert loss.isfinite()
        assert set(accuracy) == set(train_reference.HEADS)
