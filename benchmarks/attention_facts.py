"""Where a model's question looks: attention, sinks and value norms, layer by layer.

    python benchmarks/attention_facts.py --n 32 --out benchmarks/results/attention_facts.json
    python benchmarks/attention_facts.py --table benchmarks/results/attention_facts.json

Each sample is prefilled once, on the full cache. Of the attention matrix only the rows of the
question (the text behind the last visual token) are computed, in float32. Numbers are means over
samples, `*_se` their standard errors. `--table` prints the tables of docs/attention.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, settings, write_results
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from purekv import PureKVConfig
from purekv.evals import Sample, prepare_samples, read_samples
from purekv.inspect.agreement import (
    best,
    held,
    held_by_source,
    serving_layers,
    spearman,
    standard_ranks,
)
from purekv.inspect.collect import Recorder, Recording
from purekv.loading import DTYPES, Checkpoint
from purekv.reference import default_checkpoint, write_dataset
from purekv.reference.data import Geometry
from purekv.scoring import make_scorer

BUDGETS = {"20": 0.2, "10": 0.1, "5": 0.05}
WHATS = ("recall", "mass")
SINK = 10  # a sink receives more than this many times the uniform share, 1 / prompt tokens

# Shapes: L layers, H query heads, G KV heads, S positions, V visual tokens.


def layer_facts(r: Recording) -> dict[str, Tensor]:
    """Tensors [L], or [L, heads] where heads are apart."""
    mean = r.window.mean(1)  # [L, S], over heads
    seen = mean[:, r.is_visual]
    before = ~r.is_visual & ~r.is_tail
    peak, where = mean.max(-1)
    sink = seen > SINK / mean.shape[-1]  # [L, V]
    norm = r.norm[..., r.is_visual]
    median = norm.median(-1).values
    return {
        "visual_mass": r.window[..., r.is_visual].sum(-1),
        "visual_mass_last": r.last[..., r.is_visual].sum(-1),
        "first_token_mass": r.window[..., 0],
        "first_token_mass_last": r.last[..., 0],
        "text_before_mass": r.window[..., before].sum(-1),
        "question_mass": r.window[..., r.is_tail].sum(-1),
        "visual_over_text_before": seen.mean(-1) / mean[:, before].mean(-1),
        "peak": peak,
        "peak_is_first": (where == 0).float(),
        "peak_is_visual": r.is_visual[where].float(),
        "visual_peak": seen.max(-1).values,
        "visual_sinks": sink.sum(-1).float(),
        "visual_sinks_of_visual_mass": (seen * sink).sum(-1) / seen.sum(-1),
        "top_fifth_of_mass": largest_share(seen, 0.2),
        "half_of_mass_on": share_holding(seen, 0.5),
        "most_of_mass_on": share_holding(seen, 0.9),
        "most_of_mass_on_in_a_head": share_holding(r.window[..., r.is_visual], 0.9),
        "norm_cv": norm.std(-1) / norm.mean(-1),
        "norm_max": norm.max(-1).values / median,
        "norm_first_token": r.norm[..., 0] / median,
        # Mean over heads and over the sinks of a layer; nan where it has none.
        "norm_visual_sinks": ((norm * sink[:, None]).sum(-1) / median).mean(1) / sink.sum(-1),
        "norm_attention_spearman": (standard_ranks(norm) * standard_ranks(r.own)).mean(-1),
    }


def pair_facts(r: Recording) -> dict[str, Tensor]:
    """Tensors [L, L], source by target, and [L] of what other scores than CLIE's keep.

    `recall`: share of the target's own top tokens (own window attention x value norm, for each KV
    head) that the source's CLIE score keeps. `mass`: share of the target's visual attention that
    falls on what is kept.
    """
    norm, own, source = r.visual_norm, r.own, r.visual_attention
    facts = {"spearman": spearman(source)}
    for name, budget in BUDGETS.items():
        k = max(1, round(budget * norm.shape[-1]))
        weights = (best(own * norm, k), own / own.sum(-1, keepdim=True))
        for what, weight in zip(WHATS, weights, strict=True):
            facts[f"{what}_{name}"] = held_by_source(weight, source, norm, k)
            facts[f"{what}_norm_{name}"] = held(weight, norm, k)
            facts[f"{what}_own_{name}"] = held(weight, own * norm, k)
    return facts


def share_holding(attention: Tensor, share: float) -> Tensor:
    """The smallest share of the entries that holds `share` of their sum."""
    total = attention.sort(-1, descending=True).values.cumsum(-1)
    return ((total < share * total[..., -1:]).sum(-1) + 1) / attention.shape[-1]


def largest_share(attention: Tensor, part: float) -> Tensor:
    """The share of the sum that the largest `part` of the entries holds."""
    k = max(1, round(part * attention.shape[-1]))
    return attention.topk(k, -1).values.sum(-1) / attention.sum(-1)


def default_serving(num_layers: int) -> list[int]:
    """The source that serves each layer under CLIE's defaults."""
    clie = make_scorer("clie", "auto", num_layers)
    sources = [layer for layer in range(num_layers) if clie.observes(layer)]
    return [source or 0 for source in serving_layers(sources, num_layers)]


def summary_facts(layers: dict[str, Tensor], pairs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One number a sample: means over layers and heads, and over kinds of (source, target)."""
    facts = {name: value.nanmean() for name, value in layers.items()}
    count = len(layers["peak"])
    serving, every = torch.tensor(default_serving(count)), torch.arange(count)
    served = every[serving != every]
    for name, value in pairs.items():
        if value.ndim == 1:
            facts[name] = value[served].mean()
            continue
        facts[f"{name}_same"] = value[served, served].mean()
        facts[f"{name}_below"] = value[served - 1, served].mean()
        facts[f"{name}_layer_2"] = value[min(2, count - 1), every[3:]].mean()
        facts[f"{name}_default"] = value[serving[served], served].mean()
    return facts


def rows_of(samples: Sequence[dict[str, Tensor]], count: int) -> Iterator[dict[str, Any]]:
    """Means and standard errors over samples: a summary, each layer, each (source, target)."""
    stacks = {
        name: np.stack([s[name].float().cpu().numpy() for s in samples]) for name in samples[0]
    }
    serving = default_serving(count)
    row: dict[str, Any] = {"what": "summary", "n": len(samples), "layers": count}
    row["sources"] = [layer for layer in range(count) if serving.count(layer) > 1]
    for name, values in stacks.items():
        if values.ndim == 1:
            row |= mean_and_error(name, values)
    yield row
    for layer in range(count):
        row = {"what": "layer", "layer": layer}
        for name, values in stacks.items():
            if name.startswith("layers.") or (name.startswith("pairs.") and values.ndim == 2):
                one, name = values[:, layer], name.split(".")[1]
                row |= mean_and_error(name, one if one.ndim == 1 else one.mean(1))
                if one.ndim == 2:
                    row[f"{name}_by_head"] = [float(f"{x:.3g}") for x in one.mean(0)]
        yield row
    for source in range(count):
        for target in range(source, count):
            row = {"what": "pair", "source": source, "target": target}
            for name, values in stacks.items():
                if values.ndim == 3 and name.startswith("pairs."):
                    row[name.split(".")[1]] = float(f"{values[:, source, target].mean():.3g}")
            yield row


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Over the samples that have a value."""
    values = values[~np.isnan(values)]
    mean = float(f"{values.mean():.4g}") if len(values) else None
    error = float(f"{values.std(ddof=1) / len(values) ** 0.5:.2g}") if len(values) > 1 else None
    return {name: mean, f"{name}_se": error}


DEPTH = {  # columns of the table by depth, and the keys of the layer rows
    "visual mass": "visual_mass",
    "last token's": "visual_mass_last",
    "on first token": "first_token_mass",
    "visual / text, a token": "visual_over_text_before",
    "largest visual share": "visual_peak",
    "visual sinks": "visual_sinks",
    "top 20% hold": "top_fifth_of_mass",
    "90% on": "most_of_mass_on",
    "norm CV": "norm_cv",
    "max / median": "norm_max",
    "first / median": "norm_first_token",
    "rho": "norm_attention_spearman",
}
SCORES = {  # rows of the table of scores, and where in the summary their numbers are
    "CLIE, the layer itself": "{}_{}_same",
    "CLIE, the layer below": "{}_{}_below",
    "CLIE, layer 2": "{}_{}_layer_2",
    "CLIE, default sources": "{}_{}_default",
    "value norm alone": "{}_norm_{}",
    "each head's own": "{}_own_{}",
}


def tables(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables of docs/attention.md, line by line."""
    layers = [row for row in rows if row["what"] == "layer"]
    pairs = {(row["source"], row["target"]): row for row in rows if row["what"] == "pair"}
    sources = summary["sources"]
    starts = sorted({0, *sources})
    ends = [*starts[1:], len(layers)]
    blocks = {a: range(a, b) for a, b in zip(starts, ends, strict=True)}
    names = {a: f"{block[0]}-{block[-1]}" for a, block in blocks.items()}

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def average(found: Sequence[dict[str, Any]], key: str) -> str:
        values = [row[key] for row in found if row.get(key) is not None]
        return f"{np.mean(values):.2g}" if values else ""

    yield f"n = {summary['n']}, {summary['tokens']:.0f} visual tokens\n"
    yield from (line("layers", *DEPTH), line(*["---"] * (len(DEPTH) + 1)))
    for start, block in blocks.items():
        found = [layers[i] for i in block]
        yield line(names[start], *(average(found, key) for key in DEPTH.values()))
    yield from ("", line("source", *(names[s] for s in sources)))
    yield line(*["---"] * (len(sources) + 1))
    for source in sources:
        founds = [[pairs[source, i] for i in blocks[s] if i > source] for s in sources]
        keys = ("spearman", "recall_20", "recall_5")
        yield line(str(source), *(" / ".join(average(f, k) for k in keys if f) for f in founds))
    yield from ("", line("score", "rho", *(f"recall, mass at {b}%" for b in BUDGETS)))
    yield line(*["---"] * (len(BUDGETS) + 2))
    for title, key in SCORES.items():
        rho = average([summary], key.format("spearman", "").replace("__", "_"))
        cells = ([average([summary], key.format(what, b)) for what in WHATS] for b in BUDGETS)
        yield line(title, rho, *(", ".join(cell) for cell in cells))
    yield line("chance", "0", *(f"{b}, {b}" for b in BUDGETS.values()))


@torch.inference_mode()
def measure(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    results = []
    with Recorder(PureKVConfig(budget=1.0), model) as run:
        for done, sample in enumerate(samples, 1):
            inputs = prepare_samples(model, processor, [sample]).inputs
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            recording = run.recording
            assert recording is not None
            layers, pairs = layer_facts(recording), pair_facts(recording)
            found = {f"layers.{name}": value for name, value in layers.items()}
            found |= {f"pairs.{name}": value for name, value in pairs.items()}
            found |= summary_facts(layers, pairs)
            found["tokens"] = recording.is_visual.sum()
            found["question_tokens"] = recording.is_tail.sum()
            results.append(found)
            print(f"{done}/{len(samples)}", file=sys.stderr, flush=True)
    return list(rows_of(results, len(recording.norm)))


def make_samples(folder: str, a: argparse.Namespace) -> list[Sample]:
    data = a.data or write_dataset(
        folder, a.n, a.seed, geometry=Geometry("video", a.frames, a.size)
    )
    return read_samples(data, limit=a.n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory or hub id (default: embedded)")
    parser.add_argument("--data", type=Path, help="data set (default: the reference questions)")
    parser.add_argument("--n", type=int, default=32, help="samples")
    parser.add_argument("--seed", type=int, default=20_000, help="of the data; never trained on")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--size", type=int, default=280)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_facts.json")
    parser.add_argument("--table", type=Path, help="print the tables of this file, measure nothing")
    arguments = parser.parse_args()
    if arguments.table is None:
        checkpoint = Checkpoint.find(arguments.model or default_checkpoint())
        model = checkpoint.model(device=arguments.device, dtype=arguments.dtype)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(model, checkpoint.processor(), make_samples(folder, arguments))
        config = settings(arguments) | {
            "model": Path(arguments.model).name if arguments.model else "embedded",
            "data": arguments.data.name if arguments.data else "reference",
            "dtype": str(model.dtype),
        }
        write_results(arguments.out, config, rows)
    rows = json.loads((arguments.table or arguments.out).read_text())["rows"]
    print(*tables(rows[0], rows[1:]), sep="\n")


if __name__ == "__main__":
    main()
