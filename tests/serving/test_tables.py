"""Block tables lose the hole and nothing else, row by row, and under CUDA graphs too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purekv.serving.hole import Hole, Room
from purekv.serving.tables import without_holes

BLOCK = 16
ROOM = Room(budget=0.3, least=20, min_tokens=40)
COLUMNS = 40


def batch(lengths: list[tuple[int, int]], device: str = "cpu") -> list[torch.Tensor]:
    """Arguments for requests of these prompts and answers; rows in prefill have no answer."""
    holes = [ROOM.hole(prompt, BLOCK) if answer else None for prompt, answer in lengths]
    generator = torch.Generator().manual_seed(len(lengths))
    table = torch.stack([torch.randperm(1000, generator=generator)[:COLUMNS] for _ in lengths])
    numbers = [
        [prompt + answer for prompt, answer in lengths],
        [hole.first if hole else 0 for hole in holes],
        [hole.blocks if hole else 0 for hole in holes],
        [hole.entries if hole else 0 for hole in holes],
    ]
    return [table.int().to(device)] + [torch.tensor(one, device=device).int() for one in numbers]


def expected(table: torch.Tensor, prompt: int, answer: int) -> list[int]:
    """Blocks that hold something, one by one."""
    used = table.tolist()[: -(-(prompt + answer) // BLOCK)]
    hole: Hole | None = ROOM.hole(prompt, BLOCK) if answer else None
    return used[: hole.first] + used[hole.stop :] if hole else used


REQUESTS = st.tuples(st.integers(1, 500), st.integers(0, 100))


@given(st.lists(REQUESTS, min_size=1, max_size=6))
def test_stored_blocks_stay_in_order(lengths):
    arguments = batch(lengths)
    before = [one.clone() for one in arguments]
    table, stored = without_holes(*arguments)
    for row, (prompt, answer) in enumerate(lengths):
        blocks = expected(before[0][row], prompt, answer)
        assert table[row, : len(blocks)].tolist() == blocks
        assert int(stored[row]) <= len(blocks) * BLOCK < int(stored[row]) + BLOCK
    assert table.shape == arguments[0].shape
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_serves_other_requests():
    static = batch([(1, 0)] * 4, "cuda")
    without_holes(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = without_holes(*static)
    for lengths in (
        [(300, 5), (20, 9), (500, 100), (64, 1)],
        [(500, 0), (480, 33), (41, 2), (333, 77)],
    ):
        for place, values in zip(static, batch(lengths, "cuda"), strict=True):
            place.copy_(values)
        graph.replay()
        fresh = without_holes(*batch(lengths, "cuda"))
        assert all(torch.equal(one, other) for one, other in zip(captured, fresh, strict=True))
