"""Which ingredients of a score earn their place at small budgets: one at a time, on one prefill.

    python benchmarks/score_ablation.py --minutes 7 --out build/scores.jsonl    # again to go on
    python benchmarks/score_ablation.py --table build/scores.jsonl

Variants differ from CLIE in what they say. They are made here and are no methods of the library;
what earned its place is a scorer of its own there. Samples: a suite of the reference questions and
as many further pages as `--pages` says, drawn, so that no codec is needed.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference_suite import drawn
from torch import Tensor

from purekv import PureKVConfig
from purekv.evals import Media, Record, Sample, evaluate, summarise
from purekv.loading import Checkpoint
from purekv.reference import default_checkpoint
from purekv.reference.data import SUITES, Drawn, page
from purekv.reference.data import samples as draw_samples
from purekv.reference.data import suite as draw_suite
from purekv.scoring import SCORERS, LayerInputs
from purekv.scoring.clie import CLIE, default_drop_layers
from purekv.scoring.key_diff import KeyDiff

OUTPUT_WEIGHTS: list[Tensor] = []
"""Of each layer's output projection, [hidden, num_attention_heads, D]."""


@dataclass(frozen=True)
class Variant:
    """CLIE with other parts."""

    sources: tuple[int, ...] = ()
    """Empty: every layer observes itself."""
    heads: str = "mean"
    """Over query heads: "mean", "max", or "own" (mean over the group of each KV head)."""
    queries: str = "mean"
    """Over the window: "mean", "max", "rms", or "columns" (all queries, accumulated)."""
    columns: float = 0.0
    """Part of the accumulated attention in a mixture with the window's, both summing to one."""
    pool: str = ""
    """ "max3", "mean3": over 3x3 neighbours in a frame; "line7": over 7 neighbours in order."""
    weight: str = "norm"
    """ "norm", "centred" (of the value minus its head's mean) or "output" (of what it adds to the
    residual stream, mean over the group's query heads)."""
    novelty: float = 0.0
    """Exponent of 1 - cosine to the key at the same place a frame earlier."""
    rare: float = 0.0
    """Part of the places that go to keys unlike the others (KeyDiff), whatever is asked."""

    def observes(self, layer_idx: int) -> bool:
        return not self.sources or layer_idx < self.sources[0] or layer_idx in self.sources

    def observe(self, layer: LayerInputs) -> Tensor:
        found = self._attention(layer)  # [B, Hkv, groups, S]
        if self.heads == "own":
            found = found.mean(2)
        elif self.heads == "max":
            found = found.amax((1, 2))[:, None]
        else:
            found = found.mean((1, 2))[:, None]
        return pooled(found, layer, self.pool)

    def _attention(self, layer: LayerInputs) -> Tensor:
        if self.queries == "columns":
            return layer.accumulated_attention
        if self.queries != "mean":
            rows = window_rows(layer)
            weight = layer.window.is_query[:, None, None, :, None]
            if self.queries == "max":
                return rows.masked_fill(~weight, 0.0).amax(3)
            return (rows.square() * weight).sum(3).sqrt()
        found = layer.window_attention
        if self.columns:
            seen = layer.layout.is_visual[:, None, None]
            mine, all_ = (
                x * seen / (x * seen).sum(-1, keepdim=True).clamp(min=1e-9)
                for x in (found, layer.accumulated_attention)
            )
            found = (1 - self.columns) * mine + self.columns * all_
        return found

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        score = observed * self._weight(layer)
        if self.novelty:
            score = score * novelty(layer) ** self.novelty
        if self.rare:
            visual = layer.layout.is_visual[:, None]
            other = KeyDiff().score(layer, None)
            by = [rank(x.masked_fill(~visual, -torch.inf)) for x in (score, other)]
            score = -torch.minimum(by[0] / (1 - self.rare), by[1] / self.rare)
        return score

    def _weight(self, layer: LayerInputs) -> Tensor:
        value = layer.value.float()
        if self.weight == "centred":
            visual = layer.layout.is_visual[:, None, :, None].float()
            mean = (value * visual).sum(2, keepdim=True) / visual.sum(2, keepdim=True)
            return (value - mean).norm(dim=-1)
        if self.weight == "output":
            weight = OUTPUT_WEIGHTS[layer.layer_idx].to(value.device)
            weight = weight.unflatten(1, (value.shape[1], -1))  # [hidden, Hkv, groups, D]
            gram = torch.einsum("ohgd,ohge->hgde", weight, weight)
            energy = torch.einsum("bhsd,hgde,bhse->bhgs", value, gram, value)
            return energy.clamp(min=0).sqrt().mean(2)
        return layer.value_norm


def window_rows(layer: LayerInputs) -> Tensor:
    """float32 [B, Hkv, groups, W, S]: the window's attention rows."""
    if "rows" not in vars(layer):
        index = layer.window.position[:, None, :, None]
        query = layer.query.gather(
            2, index.expand(-1, layer.query.shape[1], -1, layer.query.shape[3])
        )
        query = query.float().unflatten(1, (layer.key.shape[1], -1)) * layer.scaling
        logits = query @ layer.key.float()[:, :, None].mT
        positions = torch.arange(logits.shape[-1], device=logits.device)
        visible = positions <= layer.window.position[..., None]
        visible &= layer.layout.is_token[:, None]
        logits = logits.masked_fill(~visible[:, None, None], -1e30)
        vars(layer)["rows"] = logits.softmax(-1)
    return vars(layer)["rows"]


def pooled(score: Tensor, layer: LayerInputs, kind: str) -> Tensor:
    if not kind:
        return score
    if kind == "line7":
        return F.max_pool1d(score, 7, stride=1, padding=3)
    score = score.clone()
    for row, spans in enumerate(layer.layout.spans):
        for span in spans:
            part = slice(span.start, span.start + span.length)
            plane = score[row, :, part].unflatten(1, span.grid)
            pool = F.max_pool2d if kind == "max3" else F.avg_pool2d
            score[row, :, part] = pool(plane, 3, stride=1, padding=1).flatten(1)
    return score


def novelty(layer: LayerInputs) -> Tensor:
    """float32 [B, Hkv, S]: 1 - cosine to the key a frame earlier, before rotation; 1 where there is
    no earlier frame."""
    new = torch.ones_like(layer.value_norm)
    key = layer.rotation.undo(layer.key, slice(None)) if layer.rotation else layer.key
    key = F.normalize(key.float(), dim=-1)
    for row, spans in enumerate(layer.layout.spans):
        for span in spans:
            size = span.grid[1] * span.grid[2]
            part = key[row, :, span.start : span.start + span.length]
            same = (part[:, size:] * part[:, :-size]).sum(-1)
            new[row, :, span.start + size : span.start + span.length] = (1 - same).clamp(min=0.01)
    return new


def rank(score: Tensor) -> Tensor:
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()


def variants(num_layers: int) -> dict[str, Variant]:
    clie = Variant(default_drop_layers(num_layers))  # one source per fifth of the depth
    own = Variant()
    head = replace(own, heads="own")
    made = {
        "clie2": clie,
        "each layer its own": own,
        "each head its own": head,
        "each head its own, line7": replace(head, pool="line7"),
        "each head its own, max query": replace(head, queries="max"),
        "head of the same number": replace(clie, heads="own"),
        "largest head": replace(clie, heads="max"),
        "max query": replace(clie, queries="max"),
        "rms query": replace(clie, queries="rms"),
        "3x3 max": replace(clie, pool="max3"),
        "3x3 mean": replace(clie, pool="mean3"),
        "centred norm": replace(clie, weight="centred"),
        "output norm": replace(clie, weight="output"),
        "columns": replace(clie, queries="columns"),
        "half columns": replace(clie, columns=0.5),
        "new in time": replace(clie, novelty=1.0),
        "quarter rare": replace(clie, rare=0.25),
        "half rare": replace(clie, rare=0.5),
        "each head its own, half rare": replace(head, rare=0.5),
        "each layer its own, half rare": replace(own, rare=0.5),
        "ten sources": replace(clie, sources=tuple(range(2, num_layers, 3))),
    }
    return made


def configs_of(
    num_layers: int, budgets: list[float], only: list[str] | None, plan: str | None
) -> dict[str, list[PureKVConfig]]:
    """By the variant's name, one config a budget."""
    made: dict[str, dict[str, Any]] = {name: {"scorer": name} for name in variants(num_layers)}
    fifths = {"source_layers": default_drop_layers(num_layers)}
    made |= {
        "clie": fifths,
        "last 8 tokens": {"window": 8, **fifths},
        "last token": {"window": 1, **fifths},
        "no norm": {"scorer": "attention", **fifths},
        "pyramid": {"allocation": "pyramid", **fifths},
        "ada": {"allocation": "ada", **fifths},
        "each head its own, ada": {"scorer": "each head its own", "allocation": "ada"},
        "snapkv": {"scorer": "snapkv"},
        "key_diff": {"scorer": "key_diff"},
    }
    del made["clie2"]
    if plan is not None:
        sources = {"source_layers": PureKVConfig(plan=plan).source_layers}
        SCORERS["clie only"] = CLIE.for_model  # "clie" is the default, which a plan replaces
        made |= {
            "default": {},
            "planned sources": {"scorer": "clie only"} | sources,
            "planned shares": {"plan": plan, "scorer": "clie only"} | fifths,
            "planned shares, snapkv": {"plan": plan, "scorer": "snapkv"},
            "planned, clie": {"plan": plan, "scorer": "clie only"},
            "planned, clie_rare": {"plan": plan, "scorer": "clie_rare"},
        }
    for name in variants(num_layers):
        SCORERS[name] = lambda source_layers, count, name=name: variants(count)[name]
    return {
        name: [PureKVConfig(budget=b, first_token="compressed", **fields) for b in budgets]
        for name, fields in made.items()
        if not only or name in only
    }


def spread(
    a: argparse.Namespace, device: torch.device
) -> tuple[list[Sample], Callable[[Sample], Media]]:
    """Samples without files, pages spread among the others, and what draws their pixels."""
    found: list[Drawn] = list(draw_suite(a.tokens, a.n, a.seed))
    side = next(one.grid for one, _ in SUITES[a.tokens] if one.media == "page")
    found += list(draw_samples(a.pages, a.seed + 100, page(side)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(a.seed)).tolist()
    return drawn((found[number] for number in order), a.seed, device)


def ask(a: argparse.Namespace) -> None:
    import time

    began = time.monotonic()
    checkpoint = Checkpoint.find(a.model or default_checkpoint())
    model = checkpoint.model(device=a.device, dtype=a.dtype)
    language = model.model.language_model
    heads = language.config.num_attention_heads
    OUTPUT_WEIGHTS[:] = [
        layer.self_attn.o_proj.weight.detach().float().unflatten(1, (heads, -1))
        for layer in language.layers
    ]
    configs = [
        c for cs in configs_of(len(language.layers), a.budgets, a.only, a.plan).values() for c in cs
    ]
    samples, read = spread(a, model.device)
    done = {r.id: r for r in read_records(a.out)}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with a.out.open("a") as file:
        for start in range(0, len(samples), a.chunk):
            part = [s for s in samples[start : start + a.chunk] if s.id not in done]
            for batch in evaluate(
                model, checkpoint.processor(), part, configs, batch_size=a.batch, read=read
            ):
                file.write("".join(json.dumps(one.to_dict()) + "\n" for one in batch))
                file.flush()
                print(f"{len(batch)} more, {time.monotonic() - began:.0f} s", flush=True)
                if time.monotonic() - began > 60 * a.minutes:
                    return


def read_records(path: Path) -> Iterator[Record]:
    if path.exists():
        for line in path.read_text().splitlines():
            yield Record.from_dict(json.loads(line))


def table(a: argparse.Namespace) -> None:
    """Retention with its interval, pages and later turns apart, and KL, at each budget."""
    num_layers = (
        Checkpoint.find(a.model or default_checkpoint()).config.get_text_config().num_hidden_layers
    )
    samples, _ = spread(a, torch.device("cpu"))
    records = {one.id: one for one in read_records(a.out)}
    configs = configs_of(num_layers, a.budgets, a.only, a.plan)
    rows = summarise(samples, records, [c for cs in configs.values() for c in cs])
    full, rest = rows[0], rows[1:]
    print(
        f"{full['samples']} samples of {full['tokens']} tokens, {full['n']} answers, "
        f"accuracy of the full cache {full['accuracy']:.3f}"
    )
    names = [(name, c.budget) for name, cs in configs.items() for c in cs]
    for budget in a.budgets:
        print(
            f"\n| score, at {budget:.0%} | retention | first turns | later turns "
            "| pages | others | KL |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        found = [(name, row) for (name, b), row in zip(names, rest, strict=True) if b == budget]
        for name, row in sorted(found, key=lambda pair: -pair[1]["retention"]):
            low, high = row["retention_ci95"] or (math.nan, math.nan)
            by = row["by_category"]
            others = [v for k, v in by.items() if k != "page"]
            other = sum(v["accuracy"] * v["n"] for v in others) / max(
                1, sum(v["n"] for v in others)
            )
            base = [v for k, v in full["by_category"].items() if k != "page"]
            other /= sum(v["accuracy"] * v["n"] for v in base) / max(1, sum(v["n"] for v in base))
            cells = [
                f"{row['retention']:.3f} [{low:.3f}, {high:.3f}]",
                f"{row['first_turn']['retention']:.3f}",
                f"{row['second_turn']['retention']:.3f}" if row["second_turn"] else "-",
                f"{by['page']['retention']:.3f}" if "page" in by else "-",
                f"{other:.3f}",
                f"{row['kl']:.3f}",
            ]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tokens", choices=SUITES, default="576")
    parser.add_argument("--n", type=int, default=72, help="samples of the suite")
    parser.add_argument("--pages", type=int, default=24, help="further samples that are pages")
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--plan", help="adds variants with this plan's sources and budgets")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=24, help="samples batched among themselves")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("build/scores.jsonl"))
    parser.add_argument("--table", action="store_true", help="show what is in --out, ask nothing")
    a = parser.parse_args()
    (table if a.table else ask)(a)


if __name__ == "__main__":
    main()
