"""Measure a model on a few chats, and solve for the plan that costs the least.

For budgets, each chat is prefilled once on the full cache and the output error of every (source,
target) pair of layers and of every budget is computed from what its layers attended to. What a
layer's error is worth comes from a few of the chats, answered while that layer alone sees nothing.
For speed, whatever reaches the target by the cost model (tokens left out before the first layer or
behind one, layers sparse) is tried end to end, and its error is the divergence of the next tokens
along the gold answers. What was measured is kept beside the plan until that is written, so that a
killed calibration goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from purekv.attach import Run
from purekv.config import PureKVConfig, SpatioTemporalConfig
from purekv.errors import PureKVError
from purekv.evals.answering import Read, prepare_samples, read_media, whole_chats
from purekv.evals.samples import Sample
from purekv.evals.suite import Record, evaluate
from purekv.planning.cost import CostModel
from purekv.planning.measure import Transfer, measure_transfer, measure_worth
from purekv.planning.plan import Plan, model_fingerprint
from purekv.planning.solve import enough_sources, spread
from purekv.planning.target import Target

Progress = Callable[[int, int], None]

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""At which each layer's own error is measured."""
SCORERS = ("clie", "clie_rare")
"""Both are tried with what else was found."""
MOST_SOURCES = 8
SLACK = 0.02
"""More error than with every layer its own source, above which another source is worth it."""
SENSED = 8
"""Samples on which layers are blinded, one at a time."""
DOUBT = 0.1
"""What a layer counts for at least, as a share of the layers' mean: that the others can do without
it one by one does not say that they can without all like it."""
TILE = 2
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the visual tokens, that may be left by a drop."""
DROP_FIRST = 2
DROP_LAYERS = 5
"""Behind so many layers, evenly spread, and behind the first, a drop is tried."""


@dataclass(frozen=True)
class Calibration:
    """What is calibrated, on what."""

    model: PreTrainedModel
    processor: ProcessorMixin
    samples: Sequence[Sample]
    target: Target
    read: Read | None = None
    """How a sample becomes pixels (default: its files are decoded)."""
    cost: CostModel = field(default_factory=CostModel)
    tokens: int = 65536
    """Visual tokens of a prompt for which a speed-up is meant."""
    store: Path | None = None
    """Where what was measured is kept until the plan is written."""

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers


@torch.inference_mode()
def make_plan(calibration: Calibration, advance: Progress = lambda done, total: None) -> Plan:
    """Measure, solve, and say what was found. `advance` is told of samples.

    Raises:
        PureKVError: a sample cannot be asked, or nothing reaches the target.
    """
    make = _for_speed if calibration.target.kind == "prefill" else _for_budget
    settings, expected, measured = make(calibration, advance)
    if calibration.store is not None:
        calibration.store.unlink(missing_ok=True)
    return Plan(
        model_fingerprint(calibration.model),
        calibration.num_layers,
        str(calibration.target),
        settings,
        expected,
        {"samples": len(calibration.samples), **measured},
    )


Found = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Settings, what to expect of them, what they were found from."""


def _for_budget(c: Calibration, advance: Progress) -> Found:
    """Sources and a budget for each layer."""
    is_given = c.target.kind == "kv"
    at = c.target.value if is_given else 0.1  # where sources are compared
    every = max(1, len(c.samples) // SENSED)
    sensed = {sample.id for sample in c.samples[::every][:SENSED]}

    def measure(sample: Sample) -> dict[str, Any]:
        chat, first_turn = _chat(c, sample)
        transfer = measure_transfer(c.model, chat, first_turn, at, BUDGETS)
        found = {name: _rounded(value) for name, value in vars(transfer).items()}
        if sample.id in sensed:
            found["kl"] = _rounded(measure_worth(c.model, chat, first_turn))
        return found

    count = len(c.samples)
    noted = {"sources at": at, "sensed": sorted(sensed)}
    lines = _measured(c, noted, lambda done, total: advance(done, total + count), measure)
    transfers = [_from_line(line) for line in lines]
    kl = torch.tensor([line["kl"] for line in lines if "kl" in line]).mean(0)  # [L]
    blind = torch.stack([t.blind.mean(0) for t in transfers]).mean(0)
    worth = (kl + DOUBT * kl.mean()).clamp(min=1e-9) / blind.clamp(min=1e-6)
    pairs = worth * torch.stack([t.pairs.mean(0) for t in transfers]).mean(0)
    curve = worth * torch.stack([t.curve.mean(0) for t in transfers]).mean(0)  # [N, L]
    sources, tried = enough_sources(pairs, SLACK, MOST_SOURCES)
    plans = []
    by_budget: dict[str, list[float]] = {}
    for budget in sorted({at, *BUDGETS} if is_given else BUDGETS):
        shares = [round(one / budget, 2) for one in spread(curve.T, BUDGETS, budget)]
        by_budget[str(budget)] = shares
        layers = {"source_layers": list(sources.source_layers), "layer_shares": shares}
        plans += [{"budget": budget, "scorer": scorer, **layers} for scorer in SCORERS]
    if is_given:
        plans = [plan for plan in plans if plan["budget"] == at]
    checked = _checked(c, plans, lambda done, total: advance(count + done, count + total))
    good = [of for of in checked if of["scorer"] and of["agreement"] >= c.target.value]
    if is_given:
        best = min((of for of in checked if of["scorer"]), key=lambda of: of["kl"])
    elif good:
        least = min(of["budget"] for of in good)
        best = min((of for of in good if of["budget"] == least), key=lambda of: of["kl"])
    else:
        most = max(of["agreement"] for of in checked)
        raise PureKVError(
            f"no budget up to {max(BUDGETS):g} reaches {c.target}: at most {most:.3f} of the next "
            "tokens are the full cache's; lower the target"
        )
    keys = ("budget", "scorer")
    (chosen,) = (one for one in plans if all(one[key] == best[key] for key in keys))
    expected = {
        "error": _significant(sources.error),
        "every layer its own source": _significant(float(pairs.diagonal().sum())),
        "on the calibration samples": checked,
    }
    measured = {
        "kl where a layer sees nothing": _rounded(kl),
        "error where a layer sees nothing": _rounded(blind),
        "best sources, and their error": [
            [list(one.source_layers), _significant(one.error)] for one in tried
        ],
        "budgets": list(BUDGETS),
        "worth of error by budget and layer": _rounded(curve),
        "worth of error by source and target": _rounded(pairs),
    }
    return chosen | {"layer_shares": by_budget}, expected, measured


def _chat(c: Calibration, sample: Sample) -> tuple[dict[str, Tensor], int]:
    """All turns and gold answers of a sample, and how many ids its first prompt has."""
    media = c.read(sample) if c.read else read_media(c.processor, sample)
    batch = prepare_samples(c.model, c.processor, [sample], [media])
    return whole_chats(c.processor, batch), batch.inputs["input_ids"].shape[1]


def _from_line(line: Mapping[str, Any]) -> Transfer:
    return Transfer(**{name: torch.tensor(line[name]) for name in ("pairs", "curve", "blind")})


def _checked(
    c: Calibration, plans: Sequence[Mapping[str, Any]], advance: Progress
) -> list[dict[str, Any]]:
    """Divergence and share of equal next tokens along the gold answers: of each plan, and of the
    defaults at its budget, whose scorer is None here."""
    defaults = [{"budget": budget} for budget in dict.fromkeys(plan["budget"] for plan in plans)]
    ways = [*plans, *defaults]
    configs = [PureKVConfig(**way, first_token="compressed") for way in ways]
    records = []
    for record in _asked(c, c.samples, configs):
        records.append(record)
        advance(len(records), len(c.samples))
    checked = []
    for number, way in enumerate(ways, 1):
        outcomes = [record.outcomes[number] for record in records]
        checked.append(
            {
                "budget": way["budget"],
                "scorer": way.get("scorer"),
                "kl": _significant(_mean([one for o in outcomes for one in o.kl])),
                "agreement": _significant(_mean([one for o in outcomes for one in o.agreement])),
            }
        )
    return checked


def _for_speed(c: Calibration, advance: Progress) -> Found:
    """Where tokens are dropped, how many go on, and whether layers are sparse."""
    dense_ms = c.cost.prefill([c.tokens] * c.num_layers, [0] * c.num_layers)
    tried = _fitting(c.model, _fast_enough(c, dense_ms))
    configs = [for_long_prompts(settings) for settings, _ in tried]

    def measure(sample: Sample) -> dict[str, Any]:
        (record,) = _asked(c, [sample], configs)
        outcomes = record.outcomes[1:]
        return {
            "kl": [_mean(one.kl) for one in outcomes],
            "agreement": [_mean(one.agreement) for one in outcomes],
        }

    lines = _measured(c, {"configs": [config.to_dict() for config in configs]}, advance, measure)
    found = [
        {
            **settings,
            "ms": round(ms),
            **{
                name: _significant(_mean([line[name][number] for line in lines]))
                for name in ("kl", "agreement")
            },
        }
        for number, (settings, ms) in enumerate(tried)
    ]
    best = min(range(len(tried)), key=lambda number: found[number]["kl"])
    settings, ms = tried[best]
    expected = {
        **{name: found[best][name] for name in ("kl", "agreement", "ms")},
        "speedup": round(dense_ms / ms, 2),
        "tokens": c.tokens,
        "dense ms": round(dense_ms),
    }
    return settings, expected, {"cost model": c.cost.to_dict(), "tried": found}


def _fast_enough(c: Calibration, dense_ms: float) -> list[tuple[dict[str, Any], float]]:
    """Settings that reach the target, and their ms: as many tokens as may go on, what repeats left
    out before the first layer, or what a layer finds least important behind it, the layers up to
    there dense or sparse; and all tokens, every layer sparse.

    Raises:
        PureKVError: nothing is fast enough.
    """
    num_layers, limit = c.num_layers, dense_ms / c.target.value
    step = max(1, num_layers // (DROP_LAYERS + 1))
    drops = {DROP_FIRST, *range(step, num_layers - 1, step)}
    found: list[tuple[dict[str, Any], float]] = []
    fastest = dense_ms

    def most(times: dict[float, float], settings: dict[str, Any]) -> None:
        """Add what lets most tokens go on."""
        nonlocal fastest
        fastest = min(fastest, *times.values())
        shares = [share for share, ms in times.items() if ms <= limit]
        if shares:
            found.append(({"budget": shares[-1]} | settings, times[shares[-1]]))

    fewer = {
        share: c.cost.prefill([share * c.tokens] * num_layers, [0] * num_layers) for share in SHARES
    }
    most(fewer, {"scorer": "frame_difference", "evict": "drop"})
    for tile in (0, TILE):
        whole = c.cost.prefill([c.tokens] * num_layers, [tile] * num_layers)
        fastest = min(fastest, whole)
        if whole <= limit and tile:
            found.append(({"budget": 1.0} | _sparse([tile] * num_layers), whole))
        for layer in sorted(layer for layer in drops if layer < num_layers - 1):
            times = {
                share: c.cost.dropping(num_layers, layer, c.tokens, share * c.tokens, tile)
                for share in SHARES
            }
            tiles = [tile] * (layer + 1) + [0] * (num_layers - layer - 1)
            dropping = {"scorer": "clie", "source_layers": [layer], "evict": "drop"}
            most(times, dropping | (_sparse(tiles) if tile else {}))
    if not found:
        raise PureKVError(
            f"target {c.target} is out of reach at {c.tokens} tokens: the fastest plan is "
            f"{dense_ms / fastest:.2f}x; lower it"
        )
    return found


def _fitting(
    model: PreTrainedModel, found: Sequence[tuple[dict[str, Any], float]]
) -> list[tuple[dict[str, Any], float]]:
    """Those that the model can run: some take no drop, or none before some layer.

    Raises:
        PureKVError: it can run none; says why not the last one.
    """
    fitting = []
    for settings, ms in found:
        try:
            Run(for_long_prompts(settings), model)
        except PureKVError as error:
            refused = error
        else:
            fitting.append((settings, ms))
    if not fitting:
        raise refused
    return fitting


def _sparse(tiles: Sequence[int]) -> dict[str, Any]:
    return {"prefill": "spatiotemporal", "spatiotemporal": {"tile": list(tiles)}}


def for_long_prompts(settings: Mapping[str, Any]) -> PureKVConfig:
    """A plan's settings as they are on a long prompt, though the calibration's are short."""
    pattern = settings.get("spatiotemporal")
    long = SpatioTemporalConfig(tile=tuple(pattern["tile"]), min_tokens=0) if pattern else None
    return PureKVConfig(
        **{**settings, "source_layers": tuple(settings.get("source_layers", ())) or "auto"}
        | ({"spatiotemporal": long} if long else {}),
        first_token="compressed",
    )


def _asked(
    c: Calibration, samples: Sequence[Sample], configs: Sequence[PureKVConfig]
) -> Iterator[Record]:
    for batch in evaluate(c.model, c.processor, samples, configs, batch_size=1, read=c.read):
        for record in batch:
            if record.skipped:
                raise PureKVError(f"sample {record.id} cannot be asked: {record.skipped}")
            yield record


def _measured(
    c: Calibration,
    settings: Mapping[str, Any],
    advance: Progress,
    measure: Callable[[Sample], dict[str, Any]],
) -> list[dict[str, Any]]:
    """What `measure` says of each sample; what an earlier call with the same settings kept is not
    measured again."""
    header = {"model": model_fingerprint(c.model), "target": c.target.kind, **settings}
    done: dict[str, dict[str, Any]] = {}
    if c.store is not None and c.store.is_file():
        first, *rest = c.store.read_text().splitlines(keepends=True) or [""]
        if first == json.dumps(header) + "\n":
            lines = (json.loads(line) for line in rest if line.endswith("\n"))
            done = {line.pop("id"): line for line in lines}
    if c.store is not None:
        kept = (json.dumps({"id": name, **line}) for name, line in done.items())
        c.store.write_text("".join(f"{line}\n" for line in (json.dumps(header), *kept)))
    advance(len(done), len(c.samples))
    for sample in c.samples:
        if sample.id not in done:
            done[sample.id] = measure(sample)
            if c.store is not None:
                with c.store.open("a") as file:
                    file.write(json.dumps({"id": sample.id, **done[sample.id]}) + "\n")
            advance(len(done), len(c.samples))
    return [done[sample.id] for sample in c.samples]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _rounded(x: Tensor) -> Any:
    """Nested lists of four digits."""
    values = x.tolist()

    def short(value: Any) -> Any:
        return [short(one) for one in value] if isinstance(value, list) else _significant(value)

    return short(values)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
