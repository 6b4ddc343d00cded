"""A model whose `generate` compresses the cache of each request on its own."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from purekv import families
from purekv.attach import PureKV
from purekv.config import PureKVConfig
from purekv.report import Report


class CompressingModel:
    """Stands for `model` where something else calls `generate`; all other attributes are its own.

    Every call starts from an empty cache. One with nothing to evict runs without PureKV: there are
    no visual tokens, or in no row more of them than a budget that is a count.

    Args:
        done: called after every request with its report, or None if PureKV was not needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PureKVConfig,
        done: Callable[[Report | None], None],
    ) -> None:
        self._model = model
        self._purekv = PureKV(config)
        self._done = done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> Any:
        if not self._evicts(inputs):
            output = self._model.generate(**inputs)
            self._done(None)
            return output
        with self._purekv(self._model) as run:
            output = self._model.generate(**inputs)
            self._done(run.report)
        return output

    def _evicts(self, inputs: Mapping[str, Any]) -> bool:
        config = self._model.config
        most = max(families.for_config(config).layout(config, inputs).visual_tokens)
        budget = self._purekv.config.budget
        return most > (0 if isinstance(budget, float) else budget)
