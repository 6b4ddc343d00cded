"""What a compressing server cannot do, said when it starts."""

from typing import Any

from purekv.errors import PureKVError


def check_engine(config: Any) -> None:
    """Refuse settings of vLLM under which compression would be wrong or idle.

    Args:
        config: a `VllmConfig` that asks for compression.

    Raises:
        PureKVError: the first one, with the fix.
    """
    cache, parallel = config.cache_config, config.parallel_config
    model = config.model_config
    reasons = (
        (
            config.device_config.device_type != "cpu",
            "only vLLM's CPU backend compacts so far; on a GPU, use PureKV with transformers",
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
            str(cache.cache_dtype).startswith(("fp8", "int", "nvfp4", "turbo", "ultra")),
            f"a quantised cache ({cache.cache_dtype}) would be quantised twice; use "
            "--kv-cache-dtype auto",
        ),
        (
            not model.enforce_eager,
            "compaction is not part of captured graphs or compiled forwards; add --enforce-eager",
        ),
        (
            bool(getattr(model.hf_text_config, "use_sliding_window", False)),
            "layers with a sliding window forget by themselves; serve this model without purekv",
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise PureKVError(f"purekv cannot serve: {reason}")
