"""Models whose parts are elsewhere: offloaded layers, CUDA."""

import pytest
import torch
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from purekv import PureKV, PureKVConfig
from purekv.allocation import ALLOCATIONS
from tests.core.prompts import prompt
from tests.tiny import tiny_model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
CONFIG = PureKVConfig(budget=0.3, first_token="compressed")


def test_a_device_map_with_layers_on_disk(tmp_path):
    model = tiny_model()
    with PureKV(CONFIG)(model):
        expected = model.generate(**prompt("mixed", 3), **GREEDY)
    model.save_pretrained(tmp_path / "model")
    decoder = "model.language_model"
    device_map = {
        "model.visual": "cpu",
        f"{decoder}.embed_tokens": "cpu",
        f"{decoder}.layers.0": "cpu",
        f"{decoder}.layers.1": "disk",
        f"{decoder}.layers.2": "disk",
        f"{decoder}.norm": "cpu",
        f"{decoder}.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    spread = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with PureKV(CONFIG)(spread) as run:
        ours = spread.generate(**prompt("mixed", 3), **GREEDY)
    assert torch.equal(ours, expected)
    assert run.report.compression > 1


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cuda_keeps_what_the_cpu_keeps(attention):
    model = tiny_model().double()
    model.set_attn_implementation(attention)
    inputs = prompt("mixed", 3)
    caches = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = DynamicCache()
        with PureKV(CONFIG)(model), torch.no_grad():
            model(
                **{name: value.to(device) for name, value in inputs.items()}, past_key_values=cache
            )
        caches.append(cache)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        # Rotary angles are float32 on both. transformers' eager attention in float64 gives NaN
        # at padding, which every device repeats.
        close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(ours.keys.cpu(), theirs.keys, **close)
        torch.testing.assert_close(ours.values.cpu(), theirs.values, **close)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_decoding_never_waits_for_the_device(allocation, batch):
    model = tiny_model().to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") for name, value in prompt("mixed", batch).items()}
    config = PureKVConfig(budget=0.3, allocation=allocation)
    with PureKV(config)(model), torch.no_grad():
        first = model(**inputs)
        token = inputs["input_ids"][:, -1:]
        seq_len = inputs["input_ids"].shape[1]
        step = {
            "inputs_embeds": model.get_input_embeddings()(token),
            "position_ids": torch.full((3, batch, 1), seq_len, device="cuda"),
            "past_key_values": first.past_key_values,
        }
        model(**step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision_generates_on_cuda(dtype):
    model = tiny_model().to("cuda", dtype)
    inputs = {name: value.to("cuda") for name, value in prompt("mixed", 3).items()}
    with PureKV(CONFIG)(model) as run:
        model.generate(**inputs, **GREEDY)
    bare = model.generate(**inputs, **GREEDY)
    with PureKV(PureKVConfig(budget=1.0))(model):
        whole = model.generate(**inputs, **GREEDY)
    assert torch.equal(whole, bare)
    assert run.report.compression > 1
    assert set(run.report.seconds) == {"vision", "prefill", "decode"}
