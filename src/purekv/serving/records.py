"""Where the attention backend finds what the worker of its process knows of requests."""

from typing import Any
from weakref import WeakValueDictionary

from purekv.errors import PureKVError
from purekv.serving.command import WORKERS
from purekv.serving.requests import Requests
from purekv.serving.settings import KEY

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
        worker = WORKERS.get(vllm_config.device_config.device_type, WORKERS["cpu"])
        raise PureKVError(
            f"additional config {KEY!r} asks for compression, which needs its own worker; add "
            f"--worker-cls {worker}"
        )
    return requests
