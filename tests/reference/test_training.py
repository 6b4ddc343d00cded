"""The trainer's batched arithmetic against the stock modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import language
import state
import tower

from purekv.reference.model import WEIGHTS, make_config


def test_patchify_is_the_processors() -> None:
    from transformers import Qwen2VLVideoProcessor

    frames = torch.randint(0, 256, (4, 168, 168, 3), dtype=torch.uint8)
    stock = Qwen2VLVideoProcessor(
        do_sample_frames=False, do_resize=False, patch_size=14, merge_size=2
    )
    expected = stock([frames.permute(0, 3, 1, 2)], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(
        tower.patchify(frames[None]).flatten(0, 1), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("grid", [6, 9])
def test_tower_is_the_stock_one(grid: int) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    weights = tower.init_tower(torch.Generator().manual_seed(0))
    stock = Qwen2_5_VisionTransformerPretrainedModel(make_config().vision_config).eval()
    stock.load_state_dict(weights)
    patches = torch.randn(3, 4 * grid * grid, 1176)
    with torch.no_grad():
        where = torch.tensor([[3, 2 * grid, 2 * grid]])
        expected = stock(patches.flatten(0, 1), grid_thw=where).pooler_output
        found = tower.tower(weights, patches, *tower.rope_tables(grid, torch.device("cpu")))
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("patches", "grid"), [(3, 6), (9, 6)])
def test_language_is_the_stock_one(patches: int, grid: int) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = make_config()
    config.text_config.num_hidden_layers = 2
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    lora = {k: v[:2] for k, v in language.init_lora(generator).items()}
    lora = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in lora.items()}
    weights = language.random_base(generator)
    base = language.stack_base(weights, torch.device("cpu"), torch.float32)
    base = {k: v[:2] if v.shape[0] == language.LAYERS else v for k, v in base.items()}
    state = model.state_dict()
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) > 1:
            continue
        if (stack := ".".join(parts[2:-1])) in language.PROJECTIONS:
            value = value + lora[f"{stack}.b"][int(parts[1])] @ lora[f"{stack}.a"][int(parts[1])]
        state[f"model.language_model.{name}"] = value
    state["lm_head.weight"] = weights["embed_tokens.weight"]
    for name in state:
        if name.endswith("proj.bias") and "language_model" in name:
            state[name] = torch.zeros_like(state[name])
    model.load_state_dict(state)
    prefix, tail, count = 4, 20, patches * grid * grid
    ids = torch.randint(20, 900, (2, prefix + count + tail), generator=generator)
    ids[:, prefix - 1], ids[:, prefix : prefix + count], ids[:, prefix + count] = 11, 13, 12
    seen = torch.randn(2, count, 576, generator=generator) * 0.1
    kinds = (ids == 13).int() * 2
    where = torch.tensor([[patches, 2 * grid, 2 * grid]] * 2)
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, video_grid_thw=where, second_per_grid_ts=torch.ones(2)
    )
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :prefix], seen, embeds[:, prefix + count :]], 1)
    with torch.no_grad():
        expected = model.model.language_model(inputs_embeds=embeds, position_ids=positions)
        tables = language.rope_tables(prefix, patches, grid, tail, torch.device("cpu"))
        layers = language.effective(base, lora)
        found = language.language(layers, base["norm"], embeds, *tables)
    torch.testing.assert_close(found, expected.last_hidden_state, atol=1e-3, rtol=1e-3)


def test_training_goes_on_from_its_state_and_from_shipped_weights(tmp_path):
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
