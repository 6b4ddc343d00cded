"""A worker's view of its requests, against a scheduler and its blocks in miniature."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purekv.serving.hole import Room
from purekv.serving.requests import Requests

BLOCKS, BLOCK_SIZE = 40, 4
ROOM = Room(budget=0.3, least=3, min_tokens=6)


class Scheduler:
    """Gives blocks away one by one and takes them back, as vLLM's does: the hole behind a prompt,
    everything at preemption, cancellation and the end."""

    def __init__(self) -> None:
        self.free = list(range(1, BLOCKS + 1))
        self.blocks: dict[str, dict[int, int]] = {}
        """Of each running request: block by place in its table."""
        self.tokens: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.preempted: list[str] = []
        self.finished: set[str] = set()
        self._names = 0

    def held(self) -> list[int]:
        return [block for table in self.blocks.values() for block in table.values()]

    def _allocate(self, name: str, length: int) -> bool:
        table = self.blocks.setdefault(name, {})
        wanted = [
            place for place in range(-(-length // BLOCK_SIZE)) if place not in self.places(name)
        ]
        if len(wanted) > len(self.free):
            return False
        for place in wanted:
            table[place] = self.free.pop(0)
        return True

    def places(self, name: str) -> set[int]:
        """Places of the table that have a block, or had one and lost it to the hole."""
        hole = ROOM.hole(self.tokens[name], BLOCK_SIZE)
        gone = range(hole.first, hole.stop) if hole and self.behind(name) else ()
        return {*self.blocks[name], *gone}

    def behind(self, name: str) -> bool:
        return self.computed[name] >= self.tokens[name]

    def _release(self, name: str) -> None:
        self.free.extend(self.blocks.pop(name, {}).values())

    def leave(self, name: str) -> None:
        self._release(name)
        if name in self.preempted:
            self.preempted.remove(name)
        del self.tokens[name], self.computed[name]
        self.finished.add(name)

    def preempt(self, name: str) -> None:
        self._release(name)
        self.preempted.append(name)

    def step(self, arrivals: list[int], chunk: int) -> SimpleNamespace:
        """What vLLM would send to its workers before the next step."""
        new, cached = [], SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[])
        for name in list(self.blocks):
            hole = ROOM.hole(self.tokens[name], BLOCK_SIZE)
            if hole and self.behind(name):
                for place in range(hole.first, hole.stop):
                    if place in self.blocks[name]:
                        self.free.append(self.blocks[name].pop(place))
            ahead = 1 if self.behind(name) else min(chunk, self.tokens[name] - self.computed[name])
            if self._allocate(name, self.computed[name] + ahead):
                self.computed[name] += ahead
                cached.req_ids.append(name)
                cached.new_block_ids.append(None)
        for name in list(self.preempted):
            before, self.computed[name] = self.computed[name], 0
            if self._allocate(name, before):
                self.preempted.remove(name)
                self.computed[name] = before
                cached.req_ids.append(name)
                cached.resumed_req_ids.add(name)
                cached.new_block_ids.append(([*self.blocks[name].values()],))
            else:
                self._release(name)
                self.computed[name] = before
        for length in arrivals:
            name = f"r{self._names}"
            self.tokens[name], self.computed[name] = length, 0
            if not self._allocate(name, min(chunk, length)):
                self._release(name)
                del self.tokens[name], self.computed[name]
                continue
            self._names += 1
            self.computed[name] = min(chunk, length)
            new.append(
                SimpleNamespace(
                    req_id=name,
                    prompt_token_ids=[0] * length,
                    mm_features=[],
                    block_ids=([*self.blocks[name].values()],),
                )
            )
        finished, self.finished = self.finished, set()
        return SimpleNamespace(
            finished_req_ids=finished, scheduled_new_reqs=new, scheduled_cached_reqs=cached
        )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 60), max_size=3),
            st.integers(1, 30),
            st.sampled_from(["", "finish", "preempt"]),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_every_row_is_recognised_and_no_block_is_shared_or_lost(steps):
    scheduler, requests = Scheduler(), Requests()
    for arrivals, chunk, event, which in steps:
        requests.update(scheduler.step(arrivals, chunk))
        for name, table in scheduler.blocks.items():
            request = requests.at(table[0])
            assert request is not None
            assert request.tokens == scheduler.tokens[name]
        held = scheduler.held()
        assert len(held) == len(set(held))
        assert sorted(held + scheduler.free) == list(range(1, BLOCKS + 1))
        running = sorted(scheduler.blocks)
        if event == "preempt" and running:
            scheduler.preempt(running[which % len(running)])
        anyone = sorted(scheduler.tokens)
        if event == "finish" and anyone:
            scheduler.leave(anyone[which % len(anyone)])
    for name in list(scheduler.tokens):
        scheduler.leave(name)
    requests.update(scheduler.step([], 1))
    assert len(requests) == 0
    assert sorted(scheduler.free) == list(range(1, BLOCKS + 1))
    assert all(requests.at(block) is None for block in range(BLOCKS + 1))


def test_padding_rows_belong_to_nobody():
    assert Requests().at(0) is None


def test_tags_between_the_parts_of_an_image_are_text():
    runs = [(4, 8), (11, 11)]  # first and last, as vLLM has them
    image = SimpleNamespace(mm_position=SimpleNamespace(extract_embeds_range=lambda: runs))
    new = SimpleNamespace(
        req_id="r", prompt_token_ids=[0] * 20, mm_features=[image], block_ids=([3],)
    )
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[])
    requests = Requests()
    requests.update(
        SimpleNamespace(
            finished_req_ids=set(), scheduled_new_reqs=[new], scheduled_cached_reqs=cached
        )
    )
    request = requests.at(3)
    assert request is not None
    assert request.spans == ((4, 5), (11, 1))
    assert request.tail == 12


def test_names_of_rows_spare_the_block_table():
    requests = Requests()
    new = [
        SimpleNamespace(req_id=name, prompt_token_ids=[0] * 9, mm_features=(), block_ids=([block],))
        for name, block in (("a", 3), ("b", 7))
    ]
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
    requests.update(
        SimpleNamespace(
            finished_req_ids=set(), scheduled_new_reqs=new, scheduled_cached_reqs=cached
        )
    )
    table = torch.tensor([[7], [3], [0]])
    by_block = requests.rows(table, 3)
    assert by_block == [requests.at(7), requests.at(3), None]
    requests.names = lambda: ["b", "a"]
    assert requests.rows(torch.zeros(3, 1), 3) == by_block
    assert requests.rows(table, 1) == by_block[:1]
