"""Servers that would compress wrongly, or not at all, do not start."""

import pytest

from tests.vllm.conftest import SETTINGS, Engines

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
