"""What compaction adds to an attention backend of vLLM, whichever it is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from purekv.errors import PureKVError
from purekv.scoring import Scorer, make_scorer
from purekv.serving import tables
from purekv.serving.compaction import Compaction
from purekv.serving.hole import Hole
from purekv.serving.manager import CompactedSpec
from purekv.serving.records import requests_of
from purekv.serving.requests import Request
from purekv.serving.settings import ServingConfig


@dataclass
class Chunk:
    """The part of one prompt that a step computes, shared by its layers."""

    request: Request
    rows: slice
    """Among the step's tokens."""
    start: int
    """Position of the first row."""
    compaction: Compaction
    slots: Tensor | None
    """Of the prompt's positions, int64 [N]; None if the prompt goes on in a later step."""
    row: int
    """Of the block table."""

    @property
    def places(self) -> Tensor:
        """Slots that the kept entries take, in order: those of `Hole.positions`."""
        assert self.slots is not None
        hole = self.compaction.hole
        whole = hole.first * hole.block_size
        return torch.cat([self.slots[:whole], self.slots[whole + hole.entries :]])

    @property
    def behind(self) -> slice | None:
        """Rows behind the prompt: what a request that was preempted had answered before."""
        start = self.rows.start + self.request.tokens - self.start
        return slice(start, self.rows.stop) if start < self.rows.stop else None


@dataclass
class Plan:
    """What a step has to do besides attention."""

    chunks: list[Chunk]
    behind: dict[int, Any]
    """Attention metadata of the rows behind a prompt that ends in this step, by row."""
    scorer: Scorer


def customized(spec: Any) -> Any:
    """The layer's KV cache spec, with a budget if the engine's config has one."""
    config = get_current_vllm_config_or_none()  # set by a compressing worker, not by others
    settings = config and ServingConfig.among(config.additional_config)
    if not settings:
        return spec
    if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
        raise PureKVError(
            f"purekv cannot serve: a layer's cache is a {type(spec).__name__} that forgets or "
            "packs by itself; serve this model without purekv"
        )
    return CompactedSpec.of(spec, settings.room)


class CompactingBuilder:
    """Mixed into a backend's metadata builder: rows behind their prompt lose the hole."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self._settings = ServingConfig.among(vllm_config.additional_config)
        if self._settings is None or not isinstance(kv_cache_spec, CompactedSpec):
            self._settings = None
            return
        self._block_size = vllm_config.cache_config.block_size
        if kv_cache_spec.block_size != self._block_size:
            raise PureKVError(
                f"purekv cannot serve: blocks of {self._block_size} tokens are split into blocks "
                f"of {kv_cache_spec.block_size}; add --block-size {kv_cache_spec.block_size}"
            )
        self._requests = requests_of(vllm_config)
        layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        settings = self._settings
        self._scorer = make_scorer(settings.scorer, settings.source_layers, layers)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        build = super().build  # type: ignore[misc]
        if self._settings is None:
            return build(common_prefix_len, common_attn_metadata, fast_build)
        holes, chunks = self._sort_rows(common_attn_metadata, self._settings)
        if any(holes):
            common_attn_metadata = without_holes(common_attn_metadata, holes)
        behind = {
            chunk.row: build(0, only_behind(common_attn_metadata, chunk))
            for chunk in chunks
            if chunk.behind
        }
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.plan = Plan(chunks, behind, self._scorer)
        return metadata

    def _sort_rows(
        self, common: Any, settings: ServingConfig
    ) -> tuple[list[Hole | None], list[Chunk]]:
        """The holes of rows behind their prompt, None at others; and prompts, or parts of them,
        that will be compacted when they end."""
        table = common.block_table_tensor
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if lengths is None else lengths).tolist()
        holes: list[Hole | None] = [None] * common.num_reqs
        chunks: list[Chunk] = []
        for row, request in enumerate(self._requests.rows(table, common.num_reqs)):
            rows = slice(starts[row], starts[row + 1])
            if request is None or rows.start == rows.stop:
                continue
            hole = settings.room.hole(request.tokens, self._block_size)
            start = lengths[row] - (rows.stop - rows.start)
            if hole is None:
                continue
            if start >= request.tokens:
                holes[row] = hole
                continue
            ends = lengths[row] >= request.tokens
            slots = _slots(table[row], request.tokens, self._block_size) if ends else None
            compaction = Compaction(request, hole, settings.window, settings.sinks)
            chunks.append(Chunk(request, rows, start, compaction, slots, row))
        return holes, chunks


def _slots(table: Tensor, tokens: int, block_size: int) -> Tensor:
    position = torch.arange(tokens, device=table.device)
    return table[position // block_size].long() * block_size + position % block_size


def without_holes(common: Any, holes: list[Hole | None]) -> Any:
    """Attention metadata of the entries that are stored."""
    table, seq_lens, rows = common.block_table_tensor.clone(), common.seq_lens.clone(), len(holes)
    numbers = [(hole.first, hole.blocks, hole.entries) if hole else (0, 0, 0) for hole in holes]
    first, blocks, entries = _sent(torch.tensor(numbers), table.device).unbind(1)
    table[:rows], seq_lens[:rows] = tables.without_holes(
        table[:rows], seq_lens[:rows], first, blocks, entries
    )
    return common.replace(block_table_tensor=table, seq_lens=seq_lens)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """The same on that device; from pinned memory, as else a GPU is waited for."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def only_behind(common: Any, chunk: Chunk) -> Any:
    """Attention metadata of a chunk's rows behind the prompt, as if they came in a step of their
    own: they meet what the prompt left."""
    rows = chunk.behind
    assert rows is not None
    count = rows.stop - rows.start
    starts = torch.tensor([0, count], dtype=common.query_start_loc_cpu.dtype)
    length = chunk.request.tokens + count
    one = common.replace(
        query_start_loc=_sent(starts, common.query_start_loc.device),
        query_start_loc_cpu=starts,
        seq_lens=torch.full_like(common.seq_lens[:1], length),
        seq_lens_cpu_upper_bound=torch.tensor([length], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=count,
        max_query_len=count,
        max_seq_len=length,
        block_table_tensor=common.block_table_tensor[chunk.row : chunk.row + 1],
        slot_mapping=common.slot_mapping[rows],
        is_prefilling=None,
        positions=None,
    )
    one.mm_req_doc_ranges = None  # of prompts, by row
    return without_holes(one, [chunk.compaction.hole])


class CompactingImpl:
    """Mixed into a backend's implementation: prompts that end in a step are compacted behind the
    layer's own attention, so that the prefill is exact.

    Raises:
        PureKVError: the layer has no cache of its own, or its worker does not compress.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()  # none in tools that build a layer by itself
        self.compacts = bool(config and ServingConfig.among(config.additional_config))
        if not self.compacts:
            return
        requests_of(config)  # or refuses a worker that does not compress
        if getattr(self, "kv_sharing_target_layer_name", None) is not None:
            raise PureKVError(
                "purekv cannot serve: layers that share a cache would compact it twice; serve "
                "this model without purekv"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        attended: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        plan: Plan | None = getattr(attn_metadata, "plan", None)
        for chunk in plan.chunks if plan is not None else ():
            assert plan is not None
            self._take(layer, plan.scorer, chunk, query, key, value, kv_cache)
            if chunk.behind:
                states = (one[chunk.behind] for one in (query, key, value))
                behind = plan.behind[chunk.row], output[chunk.behind]
                super().forward(layer, *states, kv_cache, *behind, *args, **kwargs)  # type: ignore[misc]
        return attended

    def _take(
        self,
        layer: Any,
        scorer: Scorer,
        chunk: Chunk,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
    ) -> None:
        """One chunk's part in the compaction of its prompt, at one layer."""
        layer_idx = extract_layer_index(layer.layer_name)
        compaction, tokens = chunk.compaction, chunk.request.tokens
        window = slice(max(chunk.start, compaction.window_start), tokens)
        before = chunk.request.observers.pop(layer_idx, [])
        if scorer.observes(layer_idx):
            part = query[chunk.rows][window.start - chunk.start : window.stop - chunk.start]
            before.append(part if chunk.slots is not None else part.clone())
        if chunk.slots is None:
            if before:
                chunk.request.observers[layer_idx] = before
            return
        if chunk.start == 0:
            key, value = key[chunk.rows][:tokens], value[chunk.rows][:tokens]
        else:
            key, value = self.stored(kv_cache, chunk.slots)
        observers = torch.cat(before) if before else query[:0]
        kept = compaction.keep(
            scorer,
            layer_idx,
            observers,
            key,
            value,
            self.scale,  # type: ignore[attr-defined]
            _average,
        )
        heads = torch.arange(key.shape[1], device=key.device)
        # vLLM's writer for GPUs takes a token's heads to lie one behind the other.
        key, value = (states[kept.T, heads].contiguous() for states in (key, value))
        self.do_kv_cache_update(layer, key, value, kv_cache, chunk.places)  # type: ignore[attr-defined]

    def stored(self, kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at these slots, [n, num_key_value_heads, D] each."""
        raise NotImplementedError


def _average(observed: Tensor) -> Tensor:
    """Over the query heads of all tensor-parallel workers."""
    workers = get_tensor_model_parallel_world_size()
    return get_tp_group().all_reduce(observed) / workers if workers > 1 else observed
