"""What cannot be served is refused at start-up, with the fix."""

import sys
from types import SimpleNamespace

import pytest

from purekv.errors import PureKVError
from purekv.serving.command import WORKERS, server_command
from purekv.serving.refusals import check_engine, check_layers
from purekv.serving.settings import KEY, ServingConfig
from purekv.serving.versions import OLDEST, check_version


def engine(**changes):
    values = {
        "device_config.device_type": "cpu",
        "cache_config.enable_prefix_caching": False,
        "cache_config.cache_dtype": "auto",
        "parallel_config.pipeline_parallel_size": 1,
        "parallel_config.decode_context_parallel_size": 1,
        "model_config.enforce_eager": True,
        "model_config.hf_text_config.use_sliding_window": False,
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    root = SimpleNamespace()
    for path, value in (values | changes).items():
        *folders, name = path.split(".")
        place = root
        for folder in folders:
            place = place.__dict__.setdefault(folder, SimpleNamespace())
        setattr(place, name, value)
    return root


def test_a_plain_engine_passes():
    check_engine(engine())


def test_on_a_gpu_forwards_may_be_compiled():
    check_engine(
        engine(**{"device_config.device_type": "cuda", "model_config.enforce_eager": False}), "cuda"
    )


@pytest.mark.parametrize(
    ("setting", "value", "fix"),
    [
        ("device_config.device_type", "xpu", "use PureKV with transformers"),
        ("device_config.device_type", "cuda", WORKERS["cuda"]),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("cache_config.enable_prefix_caching", True, "--no-enable-prefix-caching"),
        ("cache_config.cache_dtype", "fp8_e4m3", "--kv-cache-dtype auto"),
        ("parallel_config.pipeline_parallel_size", 2, "--tensor-parallel-size"),
        ("parallel_config.decode_context_parallel_size", 2, "leave it out"),
        ("model_config.enforce_eager", False, "--enforce-eager"),
        ("parallel_config.use_ubatching", True, "leave --enable-dbo"),
        ("model_config.hf_text_config.use_sliding_window", True, "without purekv"),
        ("model_config.rswa_window", 128, "without purekv"),
        ("speculative_config", object(), "--speculative-config"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
    ],
)
def test_what_compression_does_not_go_with_is_named(setting, value, fix):
    with pytest.raises(PureKVError, match=fix):
        check_engine(engine(**{setting: value}))


def test_a_layer_of_another_backend_is_named():
    check_layers({"one": 1, "two": 2}, int)
    with pytest.raises(PureKVError, match=r"two has a str.*add --attention-backend FLASH_ATTN"):
        check_layers({"one": 1, "two": "2"}, int)


def test_older_versions_were_tested_on_cpus_only():
    check_version("0.29.1")
    check_version("0.32.0+cu129", OLDEST["cuda"])
    with pytest.raises(PureKVError, match=r"0.31.0 was not tested .* install one of 0.32"):
        check_version("0.31.0", OLDEST["cuda"])


def test_the_command_for_a_gpu_names_worker_and_backend():
    command = server_command("model", ServingConfig(), [], "cuda")
    assert command[command.index("--worker-cls") + 1] == WORKERS["cuda"]
    assert command[command.index("--attention-backend") + 1] == "FLASH_ATTN"
    assert "--enforce-eager" not in command


def test_the_command_carries_the_settings():
    settings = ServingConfig(budget=0.1)
    command = server_command("model", settings, ["--port", "1"])
    assert command[0] == sys.executable
    assert f'{{"{KEY}": {{"budget": 0.1' in command[command.index("--additional-config") + 1]
    assert command[-2:] == ["--port", "1"]


@pytest.mark.parametrize("taken", ["--worker-cls=x", "--additional-config"])
def test_what_purekv_sets_cannot_be_set_again(taken):
    with pytest.raises(PureKVError, match="set by purekv serve"):
        server_command("model", ServingConfig(), [taken])
