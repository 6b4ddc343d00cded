"""Asking a model questions about a data set, and counting what it got right."""

from purekv.evals.answering import Batch, Media, answer_samples, prepare_samples, read_media
from purekv.evals.metrics import (
    accuracy_interval,
    chosen_letter,
    exact_match,
    retention_interval,
    wilson_interval,
)
from purekv.evals.samples import Sample, Turn, read_samples
from purekv.evals.shared import SharedPrefill, Stack
from purekv.evals.suite import Evaluation, evaluate, summarise

__all__ = [
    "Batch",
    "Evaluation",
    "Media",
    "Sample",
    "SharedPrefill",
    "Stack",
    "Turn",
    "accuracy_interval",
    "answer_samples",
    "chosen_letter",
    "evaluate",
    "exact_match",
    "prepare_samples",
    "read_media",
    "read_samples",
    "retention_interval",
    "summarise",
    "wilson_interval",
]
