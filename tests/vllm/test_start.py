"""Servers that would compress wrongly, or not at all, do not start."""

import sys
from pathlib import Path

import pytest

from tests.processes import run
from tests.vllm.conftest import PROCESS, SETTINGS, Engines

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("settings", "engine", "reason"),
    [
        (SETTINGS, {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        (SETTINGS, {"enforce_eager": False}, "--enforce-eager"),
        (None, {"additional_config": {"purekv": SETTINGS}}, "--worker-cls purekv.serving"),
        (None, {"worker_cls": "purekv.serving.worker.CompactingCPUWorker"}, "--additional-config"),
        ({"budget": 2.0}, {}, "write a share of the prompt below 1"),
        ({"source_layers": [9]}, {}, "source layer 9 does not exist"),
    ],
)
def test_the_reason_is_given(engines: Engines, settings, engine, reason):
    started = engines.start([[1]], [1], settings, **engine)
    assert started.returncode != 0
    assert reason in started.stderr


def test_a_language_model_inside_another_finds_the_requests(checkpoint: Path):
    """Its config is a copy, as in Qwen2.5-VL."""
    code = (
        "import sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from purekv.serving.records import register_requests, requests_of\n"
        "arguments = EngineArgs(sys.argv[1], enforce_eager=True, skip_tokenizer_init=True)\n"
        "config = arguments.create_engine_config()\n"
        "requests = register_requests(config)\n"
        "inner = config.with_hf_config(config.model_config.hf_config)\n"
        "assert inner is not config\n"
        "assert requests_of(inner) is requests\n"
    )
    done = run([sys.executable, "-c", code, checkpoint], env=PROCESS)
    assert done.returncode == 0, done.stderr
