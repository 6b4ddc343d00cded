"""The backend for NVIDIA GPUs on CPU tensors: its layouts, its metadata and what it refuses.

vLLM's two CUDA operators, attention over a paged cache and the write into it, are replaced by a few
lines of torch that do what their arguments say; the rest is vLLM's own code. This says nothing of
the operators, nor of an engine on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from purekv.errors import PureKVError
from purekv.scoring import make_scorer
from purekv.serving.compaction import Compaction
from purekv.serving.requests import Request
from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import SETTINGS

pytestmark = pytest.mark.vllm

BLOCK, BLOCKS, HEADS, KV_HEADS, DIM, LAYERS = 32, 64, 4, 2, 32, 5
LAYOUTS = ["LBNHC", "LBHNC", "LHBNC", "BLNHC", "BLHNC", "BHLNC"]
"""Of vLLM 0.32; its NHD and HND are the first two."""


def caches(layout: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Tensor:
    """vLLM's logical [L, B, H, N, 2 * D], its dimensions in memory in the order of the layout."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    shape = (layers, BLOCKS, KV_HEADS, BLOCK, 2 * DIM)
    order = KVCacheLayout[layout].stride_order
    stored = torch.full([shape[one] for one in order], torch.nan, dtype=dtype)
    return stored.permute([order.index(one) for one in range(5)])


def write(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Entry by entry, as slots are defined: block number times block size, plus the place."""
    for entry, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, BLOCK)
        cache[block, :, place, :DIM], cache[block, :, place, DIM:] = key[entry], value[entry]


@pytest.fixture(scope="module")
def flash():
    from purekv.serving import flash

    return flash


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read(flash, layout, dtype):
    torch.manual_seed(0)
    cache = caches(layout, dtype, 2)[1]
    slots = torch.randperm(BLOCKS * BLOCK)[:77]
    key, value = torch.randn(2, len(slots), KV_HEADS, DIM).to(dtype)
    write(cache, key, value, slots)
    stored_key, stored_value = flash.stored_states(cache, slots)
    assert torch.equal(stored_key, key)
    assert torch.equal(stored_value, value)


def test_all_layouts_are_tried():
    from vllm.v1.kv_cache_layout import KVCacheLayout

    assert {one.name for one in KVCacheLayout} == set(LAYOUTS)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last tokens' attention: [n, HEADS, D] over [m, KV_HEADS, D] each, causal."""
    key, value = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (key, value))
    logits = torch.einsum("nhd,mhd->hnm", query, key) * DIM**-0.5
    future = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
    return torch.einsum("hnm,mhd->nhd", logits.masked_fill(future, -torch.inf).softmax(-1), value)


def attend_paged(
    *, q, k, v, out, cu_seqlens_q, seqused_k, block_table, causal, max_seqlen_q, max_seqlen_k, **_
):
    """What FlashAttention's arguments say, request by request; [B, N, H, D] is cached each."""
    assert causal
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        assert length <= max_seqlen_k
        assert starts[row + 1] - starts[row] <= max_seqlen_q
        blocks = block_table[row, : -(-length // BLOCK)]
        key, value = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        rows = slice(starts[row], starts[row + 1])
        out[rows] = attend(q[rows], key, value)


def write_paged(key, value, key_cache, value_cache, slot_mapping, *_):
    for states, cache in ((key, key_cache), (value, value_cache)):
        assert states[0].is_contiguous()  # the kernel knows the stride of tokens only
        cache[slot_mapping // BLOCK, slot_mapping % BLOCK] = states[: len(slot_mapping)]


@pytest.fixture(scope="module")
def config(checkpoint):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=BLOCK,
        enable_prefix_caching=False,
        additional_config={"purekv": SETTINGS},
    )
    return arguments.create_engine_config()


class Worker:
    """One worker's steps, on a cache that starts as NaN: a read of what was not written shows."""

    def __init__(self, flash, config, monkeypatch, layout: str) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.backends import flash_attn
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from purekv.serving.records import register_requests

        monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", attend_paged)
        monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write_paged, raising=False)
        self.requests = register_requests(config)
        self.requests.names = lambda: self.names
        self.names: list[str] = []
        self.cache = caches(layout)
        self.tables: dict[str, Tensor] = {}
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32
        )
        backend = flash.CompactingFlashBackend
        with set_current_vllm_config(config):
            spec = backend.customize_spec(spec)
            self.impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
            self.builder = backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
        self.impl.vllm_flash_attn_version = 3
        monkeypatch.setattr("purekv.serving.backend._average", lambda observed: observed)

    def enter(self, name: str, tokens: int, blocks: Tensor) -> None:
        new = SimpleNamespace(
            req_id=name,
            prompt_token_ids=[0] * tokens,
            mm_features=(),
            block_ids=(blocks.tolist(),),
        )
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        self.requests.update(
            SimpleNamespace(
                finished_req_ids={name}, scheduled_new_reqs=[new], scheduled_cached_reqs=cached
            )
        )
        self.tables[name] = blocks

    def metadata(self, rows: list[tuple[str, int, int]]):
        """For rows of a request, the position of its first token in the step, and how many."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        self.names = [name for name, _, _ in rows]
        counts = [count for _, _, count in rows]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = torch.tensor([start + count for _, start, count in rows]).int()
        table = torch.zeros(len(rows), BLOCKS, dtype=torch.int32)
        slots = []
        for row, (name, start, count) in enumerate(rows):
            blocks = self.tables[name]
            table[row, : len(blocks)] = blocks
            position = torch.arange(start, start + count)
            slots.append(blocks[position // BLOCK].long() * BLOCK + position % BLOCK)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=len(rows),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
        )
        return self.builder.build(0, common)

    def step(self, states: dict[str, Tensor], rows: list[tuple[str, int, int]]) -> Tensor:
        """Attention's output at every layer, [LAYERS, tokens, HEADS, D]."""
        metadata = self.metadata(rows)
        outputs = []
        for layer in range(LAYERS):
            tokens = [states[name][layer, start : start + count] for name, start, count in rows]
            query, key, value = torch.cat(tokens).split([HEADS, KV_HEADS, KV_HEADS], 1)
            module = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn")
            module._q_scale = module._k_scale = module._v_scale = torch.ones(1)
            self.impl.do_kv_cache_update(
                module, key, value, self.cache[layer], metadata.slot_mapping
            )
            output = torch.full_like(query, torch.nan)
            self.impl.forward(module, query, key, value, self.cache[layer], metadata, output)
            outputs.append(output)
        return torch.stack(outputs)


def chosen(states: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, keys and values of a prompt that stay, and all behind it."""
    settings = ServingConfig.from_dict(SETTINGS)
    hole = settings.room.hole(tokens, BLOCK)
    assert hole is not None
    compaction = Compaction(Request(tokens), hole, settings.window, settings.sinks)
    scorer = make_scorer(settings.scorer, settings.source_layers, LAYERS)
    head, stays = torch.arange(KV_HEADS), []
    for layer in range(LAYERS):
        query, key, value = states[layer].split([HEADS, KV_HEADS, KV_HEADS], 1)
        kept = compaction.keep(
            scorer,
            layer,
            query[tokens - settings.window : tokens],
            key[:tokens],
            value[:tokens],
            DIM**-0.5,
            lambda observed: observed,
        )
        stays.append(tuple(torch.cat([one[kept.T, head], one[tokens:]]) for one in (key, value)))
    return stays


def expected(states: Tensor, start: int, count: int, tokens: int | None = None) -> Tensor:
    """Attention of these tokens: all of a prompt, or all behind one of so many that was
    compacted."""
    stays = None if tokens is None or start < tokens else chosen(states[:, : start + count], tokens)
    outputs = []
    for layer in range(LAYERS):
        query, *stored = states[layer, : start + count].split([HEADS, KV_HEADS, KV_HEADS], 1)
        outputs.append(attend(query[start:], *(stays[layer] if stays else stored)))
    return torch.stack(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compacted_prompt_is_attended_to_as_chosen(flash, config, monkeypatch, layout):
    """In chunks beside a short prompt that stays whole, then token by token, then preempted: prompt
    and answer in one step."""
    torch.manual_seed(0)
    worker = Worker(flash, config, monkeypatch, layout)
    long, short = 605, 40
    blocks = torch.randperm(BLOCKS).int()
    states = {
        name: torch.randn(LAYERS, tokens + 6, HEADS + 2 * KV_HEADS, DIM)
        for name, tokens in (("long", long), ("short", short))
    }
    worker.enter("long", long, blocks[:20])
    worker.enter("short", short, blocks[20:22])

    def check(output: Tensor, name: str, start: int, count: int) -> None:
        compacted = long if name == "long" else None
        wanted = expected(states[name], start, count, compacted)
        torch.testing.assert_close(output, wanted)

    check(worker.step(states, [("long", 0, 400)]), "long", 0, 400)
    output = worker.step(states, [("short", 0, short), ("long", 400, 205)])
    check(output[:, :short], "short", 0, short)
    check(output[:, short:], "long", 400, 205)
    hole = ServingConfig.from_dict(SETTINGS).room.hole(long, BLOCK)
    worker.cache[:, worker.tables["long"][hole.first : hole.stop]] = torch.nan  # freed
    for answered in range(3):
        output = worker.step(states, [("long", long + answered, 1), ("short", short + answered, 1)])
        check(output[:, :1], "long", long + answered, 1)
        check(output[:, 1:], "short", short + answered, 1)

    worker.enter("long", long, blocks[30:50])
    output = worker.step(states, [("short", short + 3, 1), ("long", 0, long + 5)])
    check(output[:, :1], "short", short + 3, 1)
    check(output[:, 1 : long + 1], "long", 0, long)
    check(output[:, long + 1 :], "long", long, 5)
    output = worker.step(states, [("long", long + 5, 1)])
    check(output, "long", long + 5, 1)


def test_work_is_planned_for_lengths_without_holes(flash, config, monkeypatch):
    """The metadata that FlashAttention 3 is given ahead."""
    from vllm.v1.attention.backends import flash_attn

    planned = []

    def plan(*, batch_size, cache_seqlens, max_seqlen_k, **_):
        planned.append((batch_size, cache_seqlens.tolist(), max_seqlen_k))
        return torch.zeros(1)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", plan, raising=False)
    worker = Worker(flash, config, monkeypatch, "LBNHC")
    worker.builder.aot_schedule = True
    worker.builder.aot_sliding_window = (-1, -1)
    worker.enter("long", 605, torch.arange(20).int())
    worker.enter("short", 40, torch.arange(20, 22).int())
    hole = ServingConfig.from_dict(SETTINGS).room.hole(605, BLOCK)
    metadata = worker.metadata([("short", 40, 1), ("long", 605, 1)])
    assert planned == [(2, [41, hole.kept + 1], 606)]
    assert metadata.seq_lens.tolist() == [41, hole.kept + 1]
    assert metadata.block_table[1, : hole.first + 1].tolist() == [*range(hole.first), hole.stop]


def test_full_graphs_are_left_to_vllm_to_take_back(flash, config):
    """By its own rule, where compression is asked for; without it nothing changes."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.compilation import CompilationConfig
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    builder = flash.CompactingFlashBuilder
    support = builder.get_cudagraph_support(config, None)
    assert support == AttentionCGSupport.NEVER
    stock = SimpleNamespace(additional_config={})
    assert builder.get_cudagraph_support(
        stock, None
    ) == FlashAttentionMetadataBuilder.get_cudagraph_support(stock, None)

    def resolved(mode: CUDAGraphMode) -> CUDAGraphMode:
        compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode)
        compilation.set_splitting_ops_for_v1(all2all_backend="naive")
        return compilation.resolve_cudagraph_mode_and_sizes(support, "FlashAttention")

    assert resolved(CUDAGraphMode.FULL_AND_PIECEWISE) == CUDAGraphMode.PIECEWISE
    assert resolved(CUDAGraphMode.PIECEWISE) == CUDAGraphMode.PIECEWISE
    with pytest.raises(ValueError, match="please try cudagraph_mode=PIECEWISE"):
        resolved(CUDAGraphMode.FULL)


def test_a_builder_for_full_graphs_is_refused(flash, config, monkeypatch):
    from vllm.config import CUDAGraphMode

    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", CUDAGraphMode.FULL)
    with pytest.raises(PureKVError, match="PIECEWISE"):
        Worker(flash, config, monkeypatch, "LBNHC")


def test_tables_of_other_groups_are_not_slipped_in(flash, config, monkeypatch):
    assert not Worker(flash, config, monkeypatch, "LBNHC").builder.supports_update_block_table


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("sinks", torch.zeros(4), "attention sinks"),
        ("alibi_slopes", torch.zeros(4), "ALiBi"),
        ("logits_soft_cap", 30.0, "soft cap"),
        ("kv_cache_dtype", "fp8", "--kv-cache-dtype bfloat16"),
    ],
)
def test_layers_that_scores_do_not_fit_are_refused(flash, setting, value, reason):
    plain = {"sinks": None, "alibi_slopes": None, "logits_soft_cap": 0, "kv_cache_dtype": "auto"}
    flash.check_layer(SimpleNamespace(**plain))
    with pytest.raises(PureKVError, match=reason):
        flash.check_layer(SimpleNamespace(**plain | {setting: value}))


def test_layers_that_share_a_cache_are_refused(flash, config):
    from vllm.config import set_current_vllm_config

    from purekv.serving.records import register_requests

    requests = register_requests(config)
    with set_current_vllm_config(config), pytest.raises(PureKVError, match="share a cache"):
        flash.CompactingFlashImpl(
            *(HEADS, DIM, 1.0, KV_HEADS, None, None, "auto"),
            kv_sharing_target_layer_name="model.layers.0.self_attn.attn",
        )
    assert len(requests) == 0


def test_the_worker_brings_the_backend_and_says_what_was_never_tried(config, monkeypatch, caplog):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from purekv.serving import cuda_worker
    from purekv.serving.plugin import register

    def start(self, vllm_config):
        self.rank, self.vllm_config = 0, vllm_config

    here = SimpleNamespace(**vars(config) | {"device_config": SimpleNamespace(device_type="cuda")})
    monkeypatch.setattr(cuda_worker.Worker, "__init__", start)
    with pytest.raises(PureKVError, match="only NVIDIA"):
        cuda_worker.CompactingCUDAWorker(here)
    register()  # as vLLM does everywhere, with compression or without
    assert not AttentionBackendEnum.FLASH_ATTN.is_overridden()
    monkeypatch.setattr(cuda_worker, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    try:
        worker = cuda_worker.CompactingCUDAWorker(here)
        path = AttentionBackendEnum.FLASH_ATTN.get_path()
    finally:
        AttentionBackendEnum.FLASH_ATTN.clear_override()
    assert path == "purekv.serving.flash.CompactingFlashBackend"
    assert "never run inside vLLM on a GPU" in caplog.text
    worker.model_runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]))
    assert worker._requests.rows(torch.zeros(1, 1), 1) == [None]
