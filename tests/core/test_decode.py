"""Decoding on a compressed cache: entries grow in place, attention copies none of them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from purekv import PureKV, PureKVConfig
from purekv.allocation import ALLOCATIONS
from purekv.attention import Backend
from purekv.attention.packed import packed_attention
from purekv.cache import ROOM, EvictingLayer, cache_bytes
from purekv.ops.ragged_decode import reference
from tests.core.prompts import prompt
from tests.tiny import tiny_model

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["token", "tokens", "crop", "reorder", "repeat", "select", "copy"]),
        st.integers(0, 2**31),
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_a_layer_that_grows_in_place_equals_one_that_concatenates(steps):
    ours, theirs = EvictingLayer(), DynamicLayer()
    entries = torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 4)
    ours.update(*entries)
    theirs.update(*entries)
    for step, seed in steps:
        picks = torch.Generator().manual_seed(seed)
        batch = theirs.keys.shape[0]
        if step in ("token", "tokens"):
            count = 1 if step == "token" else int(torch.randint(2, ROOM + 9, (), generator=picks))
            new = [torch.randn(batch, 2, count, dim, generator=picks) for dim in (3, 4)]
            for stored, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(stored, expected)
        elif step == "crop":
            count = 1 + seed % 4
            for layer in (ours, theirs):
                layer.crop(-min(count, theirs.get_seq_length() - 1))
        elif step in ("reorder", "select"):
            name = "reorder_cache" if step == "reorder" else "batch_select_indices"
            rows = torch.randint(batch, (batch,), generator=picks)
            for layer in (ours, theirs):
                getattr(layer, name)(rows)
        elif step == "repeat" and batch < 8:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
        elif step == "copy":
            ours = copy.deepcopy(ours)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_tokens_are_written_where_there_is_room():
    """The prompt takes what it needs; then entries are copied once in ROOM tokens."""
    layer = EvictingLayer()
    prompt_entries = torch.randn(1, 2, 9, 4)
    layer.update(prompt_entries, prompt_entries)
    assert layer.keys.untyped_storage().nbytes() == prompt_entries.nbytes
    token = torch.randn(1, 2, 1, 4)
    places = []
    for _ in range(3 * ROOM):
        keys, values = layer.update(token, token)
        places.append((keys.data_ptr(), values.data_ptr()))
        room = keys.untyped_storage().nbytes() // prompt_entries[:, :, :1].nbytes
        assert keys.shape[2] <= room < keys.shape[2] + ROOM
    assert len(set(places)) == 3


def test_a_cache_made_in_inference_mode_goes_on_outside():
    model = tiny_model()
    inputs = prompt()
    token = {"input_ids": torch.tensor([[7]])}
    with PureKV(PureKVConfig(budget=0.3))(model):
        with torch.inference_mode():
            cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
            model(**token, past_key_values=cache)
        with torch.no_grad():
            model(**token, past_key_values=cache)
    assert cache.layers[0].physical_length == cache.layers[0].prompt_entries + 2


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_room_is_made_behind_the_prefill_and_counted(allocation, first_token):
    model = tiny_model()
    inputs = prompt("mixed", 3)
    token = {"input_ids": torch.full((3, 1), 7)}
    cache = DynamicCache()
    config = PureKVConfig(budget=0.3, allocation=allocation, first_token=first_token)
    with PureKV(config)(model) as run, torch.no_grad():
        model(**inputs, past_key_values=cache)
        kept = cache_bytes(cache)
        assert kept == run.report.kv_bytes_kept
        if allocation != "ada":
            assert kept == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            entry = 2 * cache.layers[0].keys[:, :, :1].nbytes
            model(**token, past_key_values=cache)
            assert cache_bytes(cache) == kept + len(cache.layers) * ROOM * entry


@pytest.mark.parametrize("masked", [None, 1, 2], ids=["no mask", "rows", "heads"])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_packed_attention_is_attention(num_heads, masked):
    torch.manual_seed(0)
    query = torch.randn(3, num_heads, 1, 8)
    stored = torch.randn(2, 3, 2, 20, 8)
    key, value = stored[:, :, :, :17]  # views, as a layer with room lends them
    groups = num_heads // 2
    mask, bias = None, torch.zeros(())
    if masked is not None:
        mask = torch.rand(3, masked, 1, 17) > 0.5
        mask[..., -1] = True
        per_head = mask.expand(3, 2, 1, 17).repeat_interleave(groups, 1)
        bias = torch.zeros(per_head.shape, dtype=torch.float64).masked_fill(~per_head, -torch.inf)
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    weights = (query.double() @ keys.mT * 0.3 + bias).softmax(-1)
    expected = (weights @ values).transpose(1, 2)
    output = packed_attention(query, key, value, mask, scale=0.3)
    assert output.shape == (3, 1, num_heads, 8)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_that_hold_alike_share_one_mask(monkeypatch):
    model = tiny_model()
    made = []
    build = Backend.continuation_mask
    monkeypatch.setattr(
        Backend, "continuation_mask", lambda *args: made.append(build(*args)) or made[-1]
    )
    cache = DynamicCache()
    with PureKV(PureKVConfig(budget=0.3))(model), torch.no_grad():
        model(**prompt("mixed", 3), past_key_values=cache)
        for _ in range(2):
            model(input_ids=torch.full((3, 1), 7), past_key_values=cache)
    assert len(made) == 2
    prompt_entries = cache.layers[0].prompt_entries
    assert [mask.shape[-1] - prompt_entries for mask in made] == [1, 2]


@pytest.mark.parametrize(
    "decoding", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("batch", [1, 3])
def test_uneven_heads_attend_where_their_entries_lie(monkeypatch, batch, decoding):
    """As where a kernel does it, which here is its reference, over two turns."""
    model = tiny_model()
    inputs = prompt("mixed", batch)
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    turn = torch.randint(1, 250, (batch, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 11), value=1)
    mask[0, -5:-3] = 0  # a shorter second turn

    def chat():
        torch.manual_seed(0)
        with PureKV(PureKVConfig(budget=0.3, allocation="ada"))(model):
            first = model.generate(**inputs, **greedy, **decoding)
            if decoding:
                return (first.sequences,)
            ids, cache = torch.cat([first.sequences, turn], 1), first.past_key_values
            second = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, **greedy
            )
        return first.sequences, second.sequences

    expected = chat()
    calls = []
    monkeypatch.setattr(Backend, "takes_segments", lambda *_: True)
    monkeypatch.setattr(
        "purekv.attention.backend.ragged_decode",
        lambda *args: calls.append(1) or reference(*args),
    )
    for ours, theirs in zip(chat(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_on_cuda(dtype, masked):
    query = torch.randn(3, 6, 1, 64, device="cuda", dtype=dtype)
    stored = torch.randn(2, 3, 2, 300, 64, device="cuda", dtype=dtype)
    key, value = stored[:, :, :, :257]
    mask = None
    if masked:
        mask = torch.rand(3, 1, 1, 257, device="cuda") > 0.5
    before = torch.backends.cuda.cudnn_sdp_enabled()
    ours = packed_attention(query, key, value, mask, scale=0.3)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    on_cpu = [None if x is None else x.cpu() for x in (query, key, value, mask)]
    query, key, value = (x.float() for x in on_cpu[:3])
    expected = packed_attention(query, key, value, on_cpu[3], scale=0.3)
    close = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=close, atol=close)
