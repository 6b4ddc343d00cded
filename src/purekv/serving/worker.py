"""vLLM's worker, which tells the attention backend before each step whose rows it will see.

`--worker-cls purekv.serving.worker.CompactingCPUWorker`; nothing else of the worker is changed.
"""

from typing import Any
from weakref import WeakValueDictionary

import vllm
from vllm.config import set_current_vllm_config
from vllm.v1.worker.cpu_worker import CPUWorker

from purekv.errors import PureKVError
from purekv.serving.refusals import check_engine
from purekv.serving.requests import Requests
from purekv.serving.settings import KEY, ServingConfig
from purekv.serving.versions import check_version

_REQUESTS: WeakValueDictionary[int, Requests] = WeakValueDictionary()
"""Of each worker in this process, by the identity of its cache config: the language model inside a
vision-language one gets a `VllmConfig` of its own, and shares that."""


def register_requests(vllm_config: Any) -> Requests:
    """An empty record for the worker with that config; it lasts as long as the worker holds it."""
    requests = Requests()
    _REQUESTS[id(vllm_config.cache_config)] = requests
    return requests


def requests_of(vllm_config: Any) -> Requests:
    """What the worker with that config, or a model's variant of it, knows.

    Raises:
        PureKVError: it is a worker of vLLM's own.
    """
    requests = _REQUESTS.get(id(vllm_config.cache_config))
    if requests is None:
        raise PureKVError(
            f"additional config {KEY!r} asks for compression, which needs its own worker; add "
            "--worker-cls purekv.serving.worker.CompactingCPUWorker"
        )
    return requests


class CompactingCPUWorker(CPUWorker):
    """A CPU worker that compresses.

    Raises:
        PureKVError: an untested vLLM, no settings, or settings of vLLM that rule compression out.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_version(vllm.__version__)
        if ServingConfig.among(vllm_config.additional_config) is None:
            raise PureKVError(
                "this worker compresses, but was not told how; add --additional-config "
                f'\'{{"{KEY}": {{"budget": 0.2}}}}\', or leave --worker-cls out'
            )
        check_engine(vllm_config)
        self._requests = register_requests(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def get_kv_cache_spec(self) -> Any:
        with set_current_vllm_config(self.vllm_config):  # backends that customise it look there
            return super().get_kv_cache_spec()

    def execute_model(self, scheduler_output: Any) -> Any:
        self._requests.update(scheduler_output)
        return super().execute_model(scheduler_output)
