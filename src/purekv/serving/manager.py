"""vLLM's scheduler side: a KV cache spec with a budget, and the manager that frees the hole."""

from dataclasses import dataclass, fields
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from purekv.serving.counters import counters
from purekv.serving.hole import Room

logger = init_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompactedSpec(FullAttentionSpec):
    """Full attention to all that is stored; of a prompt, what `room` leaves."""

    room: Room

    @classmethod
    def of(cls, spec: FullAttentionSpec, room: Room) -> "CompactedSpec":
        known = {one.name: getattr(spec, one.name) for one in fields(spec) if one.init}
        return cls(**known, room=room)

    @classmethod
    def merge(cls, specs: "list[CompactedSpec]") -> "CompactedSpec":
        rooms = {spec.room for spec in specs}
        assert len(rooms) == 1, f"layers of one group have one budget, not {rooms}"
        return cls.of(FullAttentionSpec.merge([_plain(spec) for spec in specs]), next(iter(rooms)))


def _plain(spec: CompactedSpec) -> FullAttentionSpec:
    names = [one.name for one in fields(FullAttentionSpec) if one.init]
    return FullAttentionSpec(**{name: getattr(spec, name) for name in names})


class CompactedManager(FullAttentionManager):
    """Frees a request's hole once its prompt is computed."""

    def __init__(self, kv_cache_spec: CompactedSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self._room = kv_cache_spec.room
        self.compactions = 0
        self.freed_blocks = 0
        counters()  # so that /metrics shows them from the start

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Called before each step of a request, with the tokens that are surely computed."""
        assert num_prompt_tokens is not None, "this vLLM does not say how long prompts are"
        if processed_computed_tokens < num_prompt_tokens:
            return
        hole = self._room.hole(num_prompt_tokens, self.block_size)
        blocks = self.req_to_blocks.get(request_id)
        if hole is None or not blocks or blocks[hole.first].is_null:
            return
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, hole.first, hole.stop)
        freed = self.block_pool.get_num_free_blocks() - before
        assert freed == hole.blocks, f"{freed} blocks were freed of {hole}"
        self.compactions += 1
        self.freed_blocks += freed
        prompts, blocks_freed = counters()
        prompts.inc()
        blocks_freed.inc(freed)
        if self.compactions & (self.compactions - 1) == 0:  # 1, 2, 4, 8 ...
            logger.info(
                "purekv: %d prompts compacted, %d blocks freed", self.compactions, self.freed_blocks
            )


def register_manager() -> None:
    """May run more than once."""
    # vLLM fills its registry at first use, and only if it is empty; so let it be first.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(
        CompactedSpec, CompactedManager, uniform_type_base_spec=FullAttentionSpec
    )
