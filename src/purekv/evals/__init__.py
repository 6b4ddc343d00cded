"""Asking a model questions about a data set, and counting what it got right."""

from purekv.evals.answering import Batch, Media, Row, answer_samples, prepare_samples, read_media
from purekv.evals.methods import make_configs, make_methods, method_name, method_names
from purekv.evals.metrics import (
    accuracy_interval,
    chosen_letter,
    exact_match,
    mcnemar,
    retention_interval,
    wilson_interval,
)
from purekv.evals.samples import Sample, Turn, read_samples
from purekv.evals.shared import SharedPrefill, Stack
from purekv.evals.suite import Outcome, Record, evaluate
from purekv.evals.summary import summarise

__all__ = [
    "Batch",
    "Media",
    "Outcome",
    "Record",
    "Row",
    "Sample",
    "SharedPrefill",
    "Stack",
    "Turn",
    "accuracy_interval",
    "answer_samples",
    "chosen_letter",
    "evaluate",
    "exact_match",
    "make_configs",
    "make_methods",
    "mcnemar",
    "method_name",
    "method_names",
    "prepare_samples",
    "read_media",
    "read_samples",
    "retention_interval",
    "summarise",
    "wilson_interval",
]
