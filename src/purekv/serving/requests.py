"""What a worker knows of the requests it serves, by the first block that each of them holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Request:
    """One request, from its first step to its last."""

    tokens: int
    """Of its prompt."""
    spans: tuple[tuple[int, int], ...] = ()
    """Position and length of each run of visual tokens in the prompt."""
    observers: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of each observing layer, the window's queries in the prompt's chunks so far."""
    block: int = -1
    """The first one it holds, which no other request does."""

    @property
    def tail(self) -> int:
        """Position behind the last visual token; 0 without one."""
        return max((start + length for start, length in self.spans), default=0)


class Requests:
    """Kept up to date by each step's scheduler output. Attention metadata names no requests, but a
    row of its block table begins with a block that only one request holds."""

    def __init__(self) -> None:
        self.names: Callable[[], Sequence[str]] | None = None
        """Of the rows of the step that runs, where a worker can tell."""
        self._by_id: dict[str, Request] = {}
        self._by_block: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def at(self, block: int) -> Request | None:
        """The request whose first block this is; None at rows that only pad a batch."""
        return self._by_block.get(block)

    def rows(self, table: Tensor, count: int) -> list[Request | None]:
        """Whose the first rows of a step's block table are.

        Without names this reads the table's first column, which on a GPU waits for all that was
        queued before it.
        """
        if self.names is None:
            return [self.at(block) for block in table[:count, 0].tolist()]
        known = [self._by_id.get(name) for name in self.names()[:count]]
        return known + [None] * (count - len(known))  # steps that only warm up have no names

    def update(self, step: Any) -> None:
        """Take in one `SchedulerOutput`, before the step runs."""
        for name in step.finished_req_ids:
            self._leave(self._by_id.pop(name, None))
        for new in step.scheduled_new_reqs:
            self._leave(self._by_id.pop(new.req_id, None))
            request = Request(_prompt_tokens(new), _spans(new.mm_features or ()))
            self._by_id[new.req_id] = request
            self._enter(request, new.block_ids)
        cached = step.scheduled_cached_reqs
        for name, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                request = self._by_id[name]
                self._leave(request)
                request.observers.clear()  # its prompt is computed anew
                self._enter(request, block_ids)

    def _enter(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        request.block = block_ids[0][0]
        self._by_block[request.block] = request

    def _leave(self, request: Request | None) -> None:
        # A preempted request's block may be another's by now.
        if request is not None and self._by_block.get(request.block) is request:
            del self._by_block[request.block]


def _prompt_tokens(new: Any) -> int:
    ids = new.prompt_token_ids
    return len(ids if ids is not None else new.prompt_embeds)


def _spans(features: Any) -> tuple[tuple[int, int], ...]:
    # A placeholder's tags around and between the parts of an image are text.
    runs = (run for feature in features for run in feature.mm_position.extract_embeds_range())
    return tuple(sorted((first, last - first + 1) for first, last in runs))
