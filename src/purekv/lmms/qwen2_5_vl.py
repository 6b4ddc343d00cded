"""lmms-eval's Qwen2.5-VL, with PureKV around every request. Needs lmms-eval."""

import inspect
from pathlib import Path
from typing import Any

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from purekv.attach import PureKV
from purekv.errors import PureKVError
from purekv.lmms.arguments import split_arguments
from purekv.lmms.compressing import CompressingModel
from purekv.lmms.record import Record
from purekv.report import Report

MODELS_OWN = tuple(
    name
    for name, parameter in inspect.signature(Qwen2_5_VL.__init__).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
)


class PureKVQwen25VL(Qwen2_5_VL):
    """Takes the arguments of lmms-eval's `qwen2_5_vl`, each setting of `PureKVConfig`, and:

    report: a file that gets one JSON line a request, with what it kept (a file of each process
        where there are several).

    The baseline of a comparison is this model with `budget=1.0`: tasks may have prompts for one
    model's name.

    Raises:
        PureKVError: an unknown argument, or settings that the model cannot serve.
    """

    is_simple = False

    def __init__(self, *, report: str | None = None, **arguments: Any) -> None:
        self._settings, rest = split_arguments(arguments, MODELS_OWN)
        if not rest.get("use_cache", True):
            raise PureKVError("use_cache=False leaves no cache to compress; leave it out")
        super().__init__(**rest)
        PureKV(self._settings)(super().model)  # refuses before any task is read
        path = None if report is None else Path(report)
        if path is not None and self.world_size > 1:
            path = path.with_stem(f"{path.stem}-{self.rank}")
        self._record = Record(self._settings, path)

    @property
    def model(self) -> Any:
        """The model, as the methods that this class inherits call it."""
        return CompressingModel(super().model, self._settings, self._done)

    def _done(self, report: Report | None) -> None:
        if report is None and not self._record.uncompressed:
            logger.warning(
                "PureKV: a request has no more visual tokens than the budget keeps (text only?); "
                "it and others like it run uncompressed, and are counted"
            )
        self._record.add(report)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._recorded(super().generate_until, requests)

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        return self._recorded(super().generate_until_multi_round, requests)

    def _recorded(self, answer: Any, requests: list[Any]) -> list[Any]:
        """The answers; what the requests kept joins lmms-eval's own figures of the run."""
        self._record.restart()
        answers = answer(requests)
        log_metrics(
            total_elapsed_time=0.0,
            total_gen_tokens=0,
            avg_speed=0.0,
            additional_metrics=self._record.summary(),
        )
        return answers
