"""A layer's compaction on a paged cache, without vLLM: what a token behind the prompt attends to.

Scores from keys read out of their blocks, entries moved in place, the hole dropped from the block
table; then attention over the blocks in the table equals attention over the entries that scores
chose. On a GPU the kernel moves them.
"""

import pytest
import torch
from torch import Tensor

from purekv.ops.paged_compaction import paged_compaction
from purekv.scoring import make_scorer
from purekv.serving.compaction import Compaction
from purekv.serving.hole import Hole, Room
from purekv.serving.requests import Request
from purekv.serving.settings import SCORERS
from purekv.serving.tables import without_holes

BLOCK, HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 16, 8, 2, 64, 80
WINDOW, SINKS, ANSWER = 8, 4, 21
LAYERS = 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[HEADS, D] over entries [n, KV_HEADS, D] each."""
    query = query.view(KV_HEADS, -1, HEAD_DIM).double()
    key, value = (states.transpose(0, 1).double() for states in (key, value))
    return (query @ key.mT * HEAD_DIM**-0.5).softmax(-1) @ value


def read(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The entries of the blocks in a table, [length, KV_HEADS, D]."""
    position = torch.arange(length, device=cache.device)
    return cache[table[position // BLOCK], position % BLOCK]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spans", [(), ((30, 500),)], ids=["text", "video"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_token_behind_the_prompt_attends_to_what_was_chosen(scorer, spans, device):
    tokens = 605
    torch.manual_seed(0)
    states = torch.randn(LAYERS, tokens + ANSWER, HEADS + 2 * KV_HEADS, HEAD_DIM).to(device)
    table = torch.randperm(BLOCKS)[: -(-(tokens + ANSWER) // BLOCK)].to(device, torch.int32)
    hole = Room(0.3, SINKS + WINDOW, 64).hole(tokens, BLOCK)
    assert isinstance(hole, Hole)
    compaction = Compaction(Request(tokens, spans), hole, WINDOW, SINKS)
    chooser = make_scorer(scorer, (0, 2), LAYERS)
    numbers = [[tokens + ANSWER], [hole.first], [hole.blocks], [hole.entries]]
    packed, lengths = without_holes(
        table[None], *(torch.tensor(one, device=device) for one in numbers)
    )
    assert lengths.tolist() == [hole.kept + ANSWER]
    for layer in range(LAYERS):
        query, key, value = states[layer].split([HEADS, KV_HEADS, KV_HEADS], 1)
        both = torch.full((BLOCKS, BLOCK, KV_HEADS, 2 * HEAD_DIM), torch.nan, device=device)
        key_cache, value_cache = both.split(HEAD_DIM, -1)
        position = torch.arange(tokens, device=device)
        key_cache[table[position // BLOCK], position % BLOCK] = key[:tokens]
        value_cache[table[position // BLOCK], position % BLOCK] = value[:tokens]

        kept = compaction.keep(
            chooser,
            layer,
            query[compaction.window_start : tokens],
            read(key_cache, table, tokens),
            read(value_cache, table, tokens),
            HEAD_DIM**-0.5,
            lambda observed: observed,
        )
        paged_compaction(key_cache, value_cache, table, kept, tokens)
        both[table[hole.first : hole.stop]] = torch.nan  # freed, and another's by now
        position = torch.arange(tokens, tokens + ANSWER, device=device)
        key_cache[table[position // BLOCK], position % BLOCK] = key[tokens:]
        value_cache[table[position // BLOCK], position % BLOCK] = value[tokens:]

        stored = [read(one, packed[0], hole.kept + ANSWER) for one in (key_cache, value_cache)]
        head = torch.arange(KV_HEADS, device=device)
        chosen = [torch.cat([one[kept.T, head], one[tokens:]]) for one in (key, value)]
        assert torch.equal(attend(query[-1], *stored), attend(query[-1], *chosen))
