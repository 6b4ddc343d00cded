"""What compression adds to a worker of vLLM: before each step it tells the attention backend whose
rows it will see. Nothing else of the worker is changed."""

from typing import Any, ClassVar

import vllm
from vllm.config import set_current_vllm_config

from purekv.errors import PureKVError
from purekv.serving.manager import CompactedSpec
from purekv.serving.records import register_requests
from purekv.serving.refusals import check_engine, check_layers
from purekv.serving.settings import KEY, ServingConfig
from purekv.serving.versions import OLDEST, check_version


class CompactingWorker:
    """Mixed into a worker.

    Raises:
        PureKVError: an untested vLLM, no settings, or settings of vLLM that rule compression out.
    """

    device: ClassVar[str]
    """Where it runs, in vLLM's words."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_version(vllm.__version__, OLDEST[self.device])
        if ServingConfig.among(vllm_config.additional_config) is None:
            raise PureKVError(
                "this worker compresses, but was not told how; add --additional-config "
                f'\'{{"{KEY}": {{"budget": 0.2}}}}\', or leave --worker-cls out'
            )
        check_engine(vllm_config, self.device)
        self._requests = register_requests(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def get_kv_cache_spec(self) -> Any:
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            specs = super().get_kv_cache_spec()  # type: ignore[misc]  # customised by that config
        check_layers(specs, CompactedSpec)
        return specs

    def execute_model(self, scheduler_output: Any) -> Any:
        self._requests.update(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]
