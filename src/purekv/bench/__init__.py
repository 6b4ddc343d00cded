"""What compression costs and saves: time, memory and where the milliseconds go."""

from purekv.bench.ablation import PARTS, Ablation, ablate
from purekv.bench.baselines import BASELINES, why_not
from purekv.bench.results import check_out, results, write
from purekv.bench.rows import KEYS
from purekv.bench.shapes import SHAPES, random_inputs, random_model, shape_config
from purekv.bench.subjects import RandomSubject, Subject, VideoSubject
from purekv.bench.suite import FIRST_TOKENS, PHASES, Plan, check_budgets, measure, measure_prompt
from purekv.bench.workload import Workload

__all__ = [
    "BASELINES",
    "FIRST_TOKENS",
    "KEYS",
    "PARTS",
    "PHASES",
    "SHAPES",
    "Ablation",
    "Plan",
    "RandomSubject",
    "Subject",
    "VideoSubject",
    "Workload",
    "ablate",
    "check_budgets",
    "check_out",
    "measure",
    "measure_prompt",
    "random_inputs",
    "random_model",
    "results",
    "shape_config",
    "why_not",
    "write",
]
