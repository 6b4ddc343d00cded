"""Asking a model questions about a data set, and counting what it got right."""

from purekv.evals.answering import Batch, answer_samples, prepare_samples
from purekv.evals.metrics import exact_match, retention_interval, wilson_interval
from purekv.evals.samples import Sample, Turn, read_samples
from purekv.evals.shared import SharedPrefill

__all__ = [
    "Batch",
    "Sample",
    "SharedPrefill",
    "Turn",
    "answer_samples",
    "exact_match",
    "prepare_samples",
    "read_samples",
    "retention_interval",
    "wilson_interval",
]
