"""vLLM's worker for CPUs, with compression: `--worker-cls
purekv.serving.worker.CompactingCPUWorker`."""

from vllm.v1.worker.cpu_worker import CPUWorker

from purekv.serving.base_worker import CompactingWorker


class CompactingCPUWorker(CompactingWorker, CPUWorker):
    device = "cpu"
