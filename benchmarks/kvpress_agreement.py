"""Which entries kvpress keeps and which ours, on the same query, key and value.

    python benchmarks/kvpress_kept.py build/kvpress          # where kvpress is installed
    python benchmarks/kvpress_agreement.py build/kvpress --out benchmarks/results/...

`make test-kvpress` does the first and checks the second. kvpress lets all tokens of a text compete,
ours only visual ones: here all tokens are declared one image, but for those of SnapKV's window,
which stay in both. Ours keep as many entries as kvpress did.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from purekv.allocation import ALLOCATIONS, Allocation
from purekv.allocation.ada import Ada
from purekv.bench import results, write
from purekv.layout import Layout, VisualSpan
from purekv.rotation import Rotation
from purekv.scoring import Attended, LayerInputs, Scorer
from purekv.scoring.expected_attention import ExpectedAttention
from purekv.scoring.h2o import H2O
from purekv.scoring.key_diff import KeyDiff
from purekv.scoring.snapkv import SnapKV
from purekv.scoring.streaming import Streaming
from purekv.scoring.value_norm import ValueNorm
from purekv.selection import RaggedSelection, Selector
from purekv.window import Window


@dataclass(frozen=True)
class AveragePooled(SnapKV):
    """SnapKV as kvpress pools it: the mean of five neighbours, none of them in the window."""

    kernel_size: int = 5

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        assert observed is not None
        before = observed[..., : int(layer.layout.is_visual.sum())]
        pooled = F.avg_pool1d(before, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return F.pad(pooled, (0, observed.shape[-1] - before.shape[-1]))


@dataclass(frozen=True)
class MeanObserved(H2O):
    """Accumulated attention over the number of queries that could see the entry."""

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        seq_len = layer.key.shape[2]
        return super().score(layer, observed) / torch.arange(seq_len, 0, -1)


@dataclass(frozen=True)
class Comparison:
    """One of ours against one of theirs."""

    method: str
    scorer: Scorer
    theirs: str
    """A name in `kvpress_kept.PRESSES`."""
    setting: str
    """"defaults" of both, or what was made alike."""
    differs: str
    """What is left to differ; "" for nothing."""
    allocation: Allocation = ALLOCATIONS["uniform"]

    @property
    def has_window(self) -> bool:
        return isinstance(self.scorer, SnapKV)


POOLING = "ours: maximum of 7 neighbours; kvpress: mean of 5, none of them in the window"
COMPARISONS = (
    Comparison("streaming", Streaming(), "streaming", "defaults", ""),
    Comparison("key_diff", KeyDiff(), "key_diff", "defaults", ""),
    Comparison("expected_attention", ExpectedAttention(), "expected_attention", "defaults", ""),
    Comparison(
        "h2o",
        H2O(),
        "observed_attention",
        "defaults",
        "ours sums the attention an entry received, as H2O does; kvpress divides by the number of "
        "queries that could see it, which favours late entries",
    ),
    Comparison("h2o", MeanObserved(), "observed_attention", "sum over number of queries", ""),
    Comparison("snapkv", SnapKV(), "snapkv", "defaults", POOLING),
    Comparison("snapkv", SnapKV(5), "snapkv", "5 neighbours", "ours: maximum; kvpress: mean"),
    Comparison("snapkv", AveragePooled(), "snapkv", "pooling", ""),
    Comparison("snapkv", SnapKV(1), "snapkv_unpooled", "no pooling", ""),
    Comparison(
        "snapkv + ada",
        SnapKV(),
        "ada_snapkv",
        "defaults",
        f"{POOLING}; a head's floor of 0.2 is of the entries that compete in ours, and of all with "
        "the window first in kvpress, where the window uses it up",
        ALLOCATIONS["ada"],
    ),
    Comparison(
        "snapkv + ada",
        SnapKV(1),
        "ada_snapkv_unpooled",
        "no pooling",
        "the floor of a head, as above; no head here falls so low",
        ALLOCATIONS["ada"],
    ),
    Comparison(
        "snapkv + ada", SnapKV(1), "ada_snapkv_unpooled", "no pooling, no floor", "", Ada(0.0)
    ),
    Comparison("snapkv + ada", AveragePooled(), "ada_snapkv", "pooling, no floor", "", Ada(0.0)),
    Comparison(
        "value_norm",
        ValueNorm(),
        "knorm",
        "defaults",
        "another quantity: ours keeps long values, kvpress short keys, and has no press for the "
        "length of values alone",
    ),
)


class Dump:
    """What `kvpress_kept.py` wrote."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "kept.json").read_text())
        self._tensors = load_file(folder / "tensors.safetensors")
        self.config = LlamaConfig(**self.facts["config"])
        self.tokens: int = self.facts["tokens"]

    def layout(self, window: int) -> Layout:
        """One image, and behind it `window` tokens of text."""
        is_token = torch.ones(1, self.tokens, dtype=torch.bool)
        return Layout.build(is_token, [[VisualSpan(0, (1, 1, self.tokens - window), "image")]])

    def layers(self, layout: Layout) -> Iterator[LayerInputs]:
        found = self._tensors
        positions = torch.arange(self.tokens)[None]
        rotary = LlamaRotaryEmbedding(self.config)
        rotation = Rotation(found["cos"], found["sin"], positions, rotary)
        torch.testing.assert_close(rotary(found["0.key"], positions)[0], found["cos"])
        # Scorers without a window look at no query of it.
        observers = positions[:, -max(1, int(layout.is_text.sum())) :]
        window = Window(observers, torch.ones_like(observers, dtype=torch.bool))
        for number in range(self.config.num_hidden_layers):
            query, key, value = (found[f"{number}.{name}"] for name in ("query", "key", "value"))
            attended = Attended(number, query, key, value, query.shape[-1] ** -0.5)
            yield attended.for_scorers(layout, window, rotation)

    def kept(self, name: str, budget: float) -> list[Tensor]:
        """bool [num_key_value_heads, S] of each layer."""
        (case,) = (
            case for case in self.facts["cases"] if (case["name"], case["budget"]) == (name, budget)
        )
        layers = []
        for heads in case["kept"]:
            stays = torch.zeros(len(heads), self.tokens, dtype=torch.bool)
            for head, positions in enumerate(heads):
                stays[head, positions] = True
            layers.append(stays)
        return layers


def ours(comparison: Comparison, dump: Dump, quota: int) -> list[Tensor]:
    """bool [num_key_value_heads, S] of each layer; `quota` entries stay besides the window."""
    layout = dump.layout(dump.facts["window"] if comparison.has_window else 0)
    config = dump.config
    shape = config.num_hidden_layers, config.num_key_value_heads
    selector = Selector(comparison.allocation, layout.is_visual, layout.is_text, [quota], *shape)
    scorer = comparison.scorer
    layers = []
    for layer in dump.layers(layout):
        observed = scorer.observe(layer) if scorer.observes(layer.layer_idx) else None
        scores = scorer.score(layer, observed).expand(layer.value.shape[:3])
        selection = selector.select(layer.layer_idx, scores)
        stays = torch.zeros(layer.value.shape[1:3], dtype=torch.bool)
        if isinstance(selection, RaggedSelection):
            stays.view(-1)[selection.index] = True
        else:
            stays.scatter_(-1, selection.index[0], True)
        layers.append(stays)
    return layers


def compare(comparison: Comparison, dump: Dump, budget: float) -> dict[str, Any]:
    """A row: the share of kvpress' entries that ours keeps too, over all layers and heads."""
    theirs = torch.stack(dump.kept(comparison.theirs, budget))  # [L, G, S]
    window = dump.facts["window"] if comparison.has_window else 0
    stays = theirs.sum().item()
    quota = stays / (theirs.shape[0] * theirs.shape[1]) - window
    assert quota == int(quota)
    mine = torch.stack(ours(comparison, dump, int(quota)))
    assert mine.sum() == stays
    both = (mine & theirs)[..., : dump.tokens - window].sum().item()
    compete = theirs[..., : dump.tokens - window].sum().item()
    return {
        "what": "agreement",
        "method": comparison.method,
        "press": comparison.theirs,
        "alike": comparison.setting,
        "differs": comparison.differs,
        "budget": budget,
        "kept": int(quota) + window,
        "window": window,
        "agreement": round(both / compete, 4),
        "chance": round(compete / (theirs.shape[0] * theirs.shape[1] * (dump.tokens - window)), 4),
    }


def rows(dump: Dump) -> list[dict[str, Any]]:
    budgets = sorted({case["budget"] for case in dump.facts["cases"]}, reverse=True)
    return [compare(one, dump, budget) for one in COMPARISONS for budget in budgets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dump = Dump(arguments.folder)
    found = rows(dump)
    for row in found:
        print(
            f"{row['method']:20} {row['alike']:28} {row['budget']:4} {row['agreement']:7.4f}"
            f"  (chance {row['chance']:.2f})  {row['differs']}"
        )
    if arguments.out:
        facts = {name: dump.facts[name] for name in ("kvpress", "tokens", "window")}
        facts["transformers_of_kvpress"] = dump.facts["transformers"]
        write(arguments.out, results(facts, found))


if __name__ == "__main__":
    main()
