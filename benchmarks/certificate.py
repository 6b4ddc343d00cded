"""How tight the certificate is: each layer's measured error and its bounds, on the question's rows.

    python benchmarks/certificate.py --n 8 --out benchmarks/results/certificate.json

Numbers are means over samples, as shares of a layer's output; a row is a layer at one budget.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, settings, write_results
from score_ablation import spread

from purekv import PureKV, PureKVConfig
from purekv.evals import prepare_samples
from purekv.loading import Checkpoint, fingerprint
from purekv.reference import default_checkpoint

FIELDS = ("dropped_mass", "error", "bound", "dropped_scores", "transfer", "kept", "clie_bound")


@torch.inference_mode()
def measure(a: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    checkpoint = Checkpoint.find(a.model or default_checkpoint())
    model = checkpoint.model(device=a.device, dtype=a.dtype)
    samples, read = spread(a, model.device)
    found: dict[tuple[float, int], list[Any]] = {}
    for sample in samples:
        inputs = prepare_samples(model, checkpoint.processor(), [sample], [read(sample)]).inputs
        for budget in a.budgets:
            config = PureKVConfig(budget=budget, plan=a.plan, certificate=True)
            with PureKV(config)(model) as run:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            for layer, one in enumerate(run.report.certificate or []):
                assert one.error <= one.bound + 1e-5, (sample.id, layer, one)
                assert one.bound <= (one.clie_bound or one.bound) + 1e-5, (sample.id, layer, one)
                found.setdefault((budget, layer), []).append(one)
    rows = []
    for (budget, layer), ones in found.items():
        row: dict[str, Any] = {"what": "certificate", "budget": budget, "layer": layer}
        for name in FIELDS:
            row[name] = float(f"{sum(getattr(one, name) for one in ones) / len(ones):.4g}")
        rows.append(row | {"n": len(ones)})
    return fingerprint(model), rows


def show(rows: list[dict[str, Any]]) -> None:
    """Means over layers, the layer with the largest error, and ratios of sums."""
    print("| budget | dropped mass | error | bound 1 | bound 2 | bound 1 / error | 2 / error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        some = [row for row in rows if row["budget"] == budget]
        mean = {name: sum(row[name] for row in some) / len(some) for name in FIELDS}
        cells = [f"{mean[name]:.3f}" for name in ("dropped_mass", "error", "bound", "clie_bound")]
        ratios = [f"{mean[name] / mean['error']:.2f}" for name in ("bound", "clie_bound")]
        print(f"| {budget:.0%} | {' | '.join(cells + ratios)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--plan")
    parser.add_argument("--tokens", default="576")
    parser.add_argument("--n", type=int, default=8, help="samples of the suite")
    parser.add_argument("--pages", type=int, default=2, help="further samples that are pages")
    parser.add_argument("--seed", type=int, default=31_000)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.2, 0.1, 0.05])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "certificate.json")
    a = parser.parse_args()
    model, rows = measure(a)
    write_results(a.out, settings(a) | {"model": model}, rows)
    show(rows)


if __name__ == "__main__":
    main()
