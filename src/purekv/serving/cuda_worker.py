"""vLLM's worker for NVIDIA GPUs, with compression: `--worker-cls
purekv.serving.cuda_worker.CompactingCUDAWorker`."""

import logging
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from purekv.errors import PureKVError
from purekv.serving.base_worker import CompactingWorker

UNTRIED = (
    "purekv: the CUDA backend was written against vLLM 0.32's sources; its arithmetic is tested on "
    "CPU tensors, its table rewrite and choice of entries on an H100 outside vLLM, and it was "
    "never run inside vLLM on a GPU"
)


class CompactingCUDAWorker(CompactingWorker, Worker):
    device = "cuda"

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not current_platform.is_cuda():  # ROCm calls its devices cuda as well
            raise PureKVError("purekv cannot serve: of GPUs, only NVIDIA's are provided for")
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, "purekv.serving.flash.CompactingFlashBackend"
        )
        super().__init__(vllm_config, *args, **kwargs)
        if self.rank == 0:
            logging.getLogger(__name__).warning(UNTRIED)
        # The block table of a step is on the device, and reading it would wait for the step before.
        self._requests.names = lambda: self.model_runner.input_batch.req_ids
