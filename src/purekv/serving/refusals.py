"""What a compressing server cannot do, said when it starts."""

from collections.abc import Mapping
from typing import Any

from purekv.errors import PureKVError
from purekv.serving.command import WORKERS


def check_engine(config: Any, device: str = "cpu") -> None:
    """Refuse settings of vLLM under which compression would be wrong or idle.

    Args:
        config: a `VllmConfig` that asks for compression.
        device: what the worker is for, in vLLM's words.

    Raises:
        PureKVError: the first one, with the fix.
    """
    cache, parallel = config.cache_config, config.parallel_config
    model, place = config.model_config, config.device_config.device_type
    reasons = (
        (
            place not in WORKERS,
            f"vLLM compacts on CPUs and NVIDIA GPUs only, not on {place}; use PureKV with "
            "transformers",
        ),
        (
            place != device,
            f"this worker is for {device}; write --worker-cls {WORKERS.get(place)}",
        ),
        (
            getattr(config, "use_v2_model_runner", False),
            "vLLM's second model runner was not tested; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            cache.enable_prefix_caching,
            "prefix caching would hand a compacted prompt's blocks to other requests; add "
            "--no-enable-prefix-caching",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding may take back tokens behind a compacted prompt; leave "
            "--speculative-config out",
        ),
        (
            config.kv_transfer_config is not None,
            "KV connectors would move blocks that are freed; leave --kv-transfer-config out",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "scores do not travel between pipeline stages; use --tensor-parallel-size instead of "
            "--pipeline-parallel-size",
        ),
        (
            parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism shards the positions that compaction moves; leave it out",
        ),
        (
            bool(getattr(parallel, "use_ubatching", False)),
            "steps in two halves would cut prompts in two; leave --enable-dbo and --ubatch-size "
            "out",
        ),
        (
            str(cache.cache_dtype).startswith(("fp8", "int", "nvfp4", "turbo", "ultra")),
            f"a quantised cache ({cache.cache_dtype}) would be quantised twice; use "
            "--kv-cache-dtype auto",
        ),
        (
            place == "cpu" and not model.enforce_eager,
            "compaction is not part of compiled forwards on a CPU; add --enforce-eager",
        ),
        (
            bool(getattr(model.hf_text_config, "use_sliding_window", False))
            or getattr(model, "rswa_window", None) is not None,
            "layers with a sliding window forget by themselves; serve this model without purekv",
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise PureKVError(f"purekv cannot serve: {reason}")


def check_layers(specs: Mapping[str, Any], compacted: type) -> None:
    """Refuse a model of which some layers would not be compressed.

    Args:
        specs: KV cache specs, by the names of their layers.
        compacted: the class of those with a budget.

    Raises:
        PureKVError: one has another spec; the message names it, and the fix.
    """
    for name, spec in specs.items():
        if not isinstance(spec, compacted):
            raise PureKVError(
                f"purekv cannot serve: {name} has a {type(spec).__name__}, which another attention "
                "backend made; on a GPU add --attention-backend FLASH_ATTN, and if that was not "
                "it, serve this model without purekv"
            )
