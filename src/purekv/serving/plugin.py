"""What vLLM runs in each of its processes at start-up."""

import logging


def register() -> None:
    """Make compression known to vLLM; nothing is compressed unless `--additional-config` asks.

    May run more than once. Where vLLM was not tested nothing is made known: the worker class then
    refuses to start, with the reason. The backend for GPUs is made known by the worker that uses
    it: on a GPU, vLLM without compression does not meet our code.
    """
    import vllm

    from purekv.errors import PureKVError
    from purekv.serving.versions import check_version

    try:
        check_version(vllm.__version__)
    except PureKVError as error:
        logging.getLogger(__name__).warning("purekv: %s", error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from purekv.serving.manager import register_manager

    register_manager()
    register_backend(AttentionBackendEnum.CPU_ATTN, "purekv.serving.cpu.CompactingCPUBackend")
