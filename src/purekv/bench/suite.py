"""All phases of one prompt, dense and compressed in turn, as rows."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from purekv import families
from purekv.attach import PureKV
from purekv.bench import phases, rows
from purekv.bench.ablation import Ablation, ablate
from purekv.bench.baselines import BASELINES, attention, why_not
from purekv.bench.phases import Measured
from purekv.bench.workload import Workload, restored_positions
from purekv.budget import keep_counts
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.scoring import make_scorer

PHASES = ("decode_video", "vision", "lm_prefill", "ttft", "decode", "overhead")
FIRST_TOKENS = ("exact", "compressed")
OUT_OF_MEMORY = "out of memory; lower --tokens or --batch"


@dataclass(frozen=True)
class Plan:
    """What to measure on each prompt.

    Raises:
        PureKVError: a name or a number that is not allowed; the message says what is.
    """

    configs: tuple[PureKVConfig, ...]
    """The compressed runs."""
    baselines: tuple[str, ...] = tuple(BASELINES)
    """Attention of the dense model; "sdpa" is always measured."""
    phases: tuple[str, ...] = PHASES
    repeats: int = 5
    """Measured rounds, after one to warm up."""
    decode_tokens: int = 16
    """Decoding steps of a round."""

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("baselines", self.baselines, BASELINES),
            ("phases", self.phases, PHASES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise PureKVError(f"{kind}={unknown[0]!r} is unknown; use {', '.join(known)}")
        for name in ("repeats", "decode_tokens"):
            if getattr(self, name) < 1:
                raise PureKVError(f"{name}={getattr(self, name)}; it must be at least 1")
        object.__setattr__(self, "baselines", tuple(dict.fromkeys(("sdpa", *self.baselines))))


@dataclass(frozen=True)
class Variant:
    """One way to run the language model: the dense one's attention, or a compressed run."""

    baseline: str
    config: PureKVConfig | None = None


Key = tuple[Variant, str]
Advance = Callable[[int, int], None]


def _silent(done: int, total: int) -> None: ...


@torch.inference_mode()
def measure(workload: Workload, plan: Plan, advance: Advance = _silent) -> list[dict[str, Any]]:
    """Rows of every phase but "decode_video". The model is left as it was.

    Rounds go through the dense model's baselines, then the compressed runs, then the ablations, so
    that what is compared ran within the same few moments; the first round is not counted.
    `advance(done, total)` counts rounds.
    """
    session = _Session(workload, plan)
    with restored_positions(workload.model):
        for number in range(1 + plan.repeats):
            session.round()
            if number == 0:
                session.forget()
            advance(1 + number, 1 + plan.repeats)
    return list(session.rows())


def measure_prompt(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    batch: int,
    plan: Plan,
    advance: Advance = _silent,
) -> list[dict[str, Any]]:
    """`measure` on inputs of one row, `batch` times over; one skipped row if they do not fit."""
    try:
        workload = Workload.prepare(model, inputs, batch)
    except torch.OutOfMemoryError:
        layout = families.for_config(model.config).layout(model.config, inputs)
        prompt = {"tokens": layout.visual_tokens[0], "batch": batch}
        return [rows.row("lm_prefill", **prompt, **rows.method(None), skipped=OUT_OF_MEMORY)]
    return measure(workload, plan, advance)


def check_budgets(config: Any, inputs: Mapping[str, Tensor], plan: Plan) -> None:
    """Raises PureKVError for a run that the model of that config or the prompt has no room for."""
    layout = families.for_config(config).layout(config, inputs)
    num_layers = config.get_text_config().num_hidden_layers
    for one in plan.configs:
        make_scorer(one.scorer, one.source_layers, num_layers)
        keep_counts(one.budget, layout)


class _Session:
    """The rounds on one prompt."""

    def __init__(self, workload: Workload, plan: Plan) -> None:
        self._workload, self._plan = workload, plan
        self._variants = [Variant(name) for name in plan.baselines]
        self._variants += [Variant("sdpa", config) for config in plan.configs]
        self._ablated = []
        if "overhead" in plan.phases:
            self._ablated = [
                Variant("sdpa", replace(config, first_token=first_token))
                for config in plan.configs
                for first_token in FIRST_TOKENS
            ]
        self._skipped: dict[Variant, str] = {}
        for name in plan.baselines:
            if reason := why_not(workload, name):
                self._skipped[Variant(name)] = reason
        self.forget()

    def forget(self) -> None:
        self._measured: dict[Key, list[Measured]] = defaultdict(list)
        self._ablations: dict[Variant, list[Ablation]] = defaultdict(list)
        self._vision: list[Measured] = []

    def round(self) -> None:
        if "vision" in self._plan.phases:
            self._vision.append(phases.encode_pixels(self._workload))
        for variant in self._variants:
            self._unless_it_fails(variant, self._pass)
        for variant in self._ablated:
            self._unless_it_fails(variant, self._ablate)

    def _unless_it_fails(self, variant: Variant, run: Callable[[Variant], None]) -> None:
        if variant in self._skipped:
            return
        try:
            run(variant)
        except torch.OutOfMemoryError:
            self._skipped[variant] = OUT_OF_MEMORY
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            self._skipped[variant] = "PyTorch's FlashAttention-2 kernel does not take this model"
        if variant in self._skipped and self._workload.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, variant: Variant) -> None:
        workload, wanted = self._workload, self._plan.phases
        with ExitStack() as stack:
            stack.enter_context(attention(workload.model, variant.baseline))
            if variant.config is not None:
                stack.enter_context(PureKV(variant.config)(workload.model))
            if {"lm_prefill", "decode", "overhead"}.intersection(wanted):
                cache = DynamicCache()
                self._measured[variant, "lm_prefill"].append(phases.prefill(workload, cache))
                if "decode" in wanted:
                    step = phases.decode(workload, cache, self._plan.decode_tokens)
                    self._measured[variant, "decode"].append(step)
                del cache
            if "ttft" in wanted:
                self._measured[variant, "ttft"].append(phases.first_token(workload))

    def _ablate(self, variant: Variant) -> None:
        assert variant.config is not None
        with attention(self._workload.model, variant.baseline):
            self._ablations[variant].append(ablate(self._workload, variant.config))

    def rows(self) -> Iterator[dict[str, Any]]:
        prompt = {"tokens": self._workload.tokens, "batch": self._workload.batch}
        if self._vision:
            yield rows.row("vision", **prompt, **rows.timing(self._vision))
        for what in ("lm_prefill", "ttft", "decode"):
            if what in self._plan.phases:
                for variant in self._variants:
                    yield from self._rows_of(what, variant, prompt)
        for variant in self._ablated:
            values = {**prompt, **rows.method(variant.config)}
            if variant in self._skipped:
                yield rows.row("overhead", **values, skipped=self._skipped[variant])
            else:
                dense = self._of(Variant("sdpa"), "lm_prefill")
                yield rows.row(
                    "overhead", **values, **rows.overhead(self._ablations[variant], dense)
                )

    def _rows_of(
        self, what: str, variant: Variant, prompt: dict[str, int]
    ) -> Iterator[dict[str, Any]]:
        """A baseline's own row; or one of a compressed run for each baseline that ran."""
        values: dict[str, Any] = {**prompt, **rows.method(variant.config)}
        if variant.config is None:
            values["baseline"] = variant.baseline
        if variant in self._skipped:
            yield rows.row(what, **values, skipped=self._skipped[variant])
            return
        ours = self._measured[variant, what]
        values |= rows.timing(ours)
        if what == "decode":
            values["tok_s"] = 1000 * self._workload.batch / values["ms"]
        if variant.config is None:
            yield rows.row(what, **values, speedup=1.0)
            return
        ran = {name: self._of(Variant(name), what) for name in self._plan.baselines}
        compared = {name: theirs for name, theirs in ran.items() if theirs is not None}
        for name, theirs in compared.items():
            yield rows.row(what, **values, baseline=name, speedup=rows.speedup(theirs, ours))
        if not compared:
            yield rows.row(what, **values)

    def _of(self, variant: Variant, what: str) -> list[Measured] | None:
        return None if variant in self._skipped else self._measured[variant, what]
