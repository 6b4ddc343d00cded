"""The benchmark of decoding: its caches are what a prefill would leave, its rows say all."""

import json
import sys
from pathlib import Path

import pytest
import torch

from purekv import PureKV
from purekv.bench import random_model
from purekv.bench.filled import compressed_cache, dynamic_cache, growing_cache
from purekv.cache import cache_bytes, is_compressed
from tests.processes import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def test_filled_caches_hold_what_they_say():
    model = random_model("tiny", torch.device("cpu"), torch.float32, num_hidden_layers=2)
    entry = 2 * 2 * 64 * 4 * 2 * 3  # keys and values of two heads in two layers, three rows
    full = dynamic_cache(model, 3, 40), growing_cache(model, 3, 40)
    assert [cache_bytes(cache) for cache in full] == [40 * entry] * 2
    even = compressed_cache(model, 3, 40, 10)
    uneven = compressed_cache(model, 3, 40, 10, uneven=True)
    assert cache_bytes(even) == 10 * entry
    assert 10 * entry <= cache_bytes(uneven) < 11 * entry
    assert [layer.physical_length for layer in uneven.layers] == [15, 15]
    token = {"input_ids": torch.full((3, 1), 7), "position_ids": torch.full((3, 3, 1), 40)}
    for cache in (even, uneven):
        assert is_compressed(cache)
        assert cache.get_seq_length() == 40
        with PureKV()(model), torch.no_grad():
            logits = model(**token, past_key_values=cache).logits
        assert logits.isfinite().all()
        assert cache.get_seq_length() == 41


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_rows(tmp_path, device):
    out = tmp_path / "decode.json"
    words = f"--shapes tiny --tokens 100 --batch 1,2 --budgets 0.2 --device {device} --layers 2"
    command = [sys.executable, SCRIPT, *words.split(), "--steps", "2", "--repeats", "2"]
    dtype = "float32" if device == "cpu" else "bfloat16"
    done = run([*command, "--dtype", dtype, "--out", out])
    assert not done.returncode, done.stderr
    data = json.loads(out.read_text())
    rows = [row for row in data["rows"] if row["what"] == "decode" and not row["skipped"]]
    launches = ("eager", "graph", "graph_fused") if device == "cuda" else ("eager",)
    for batch in (1, 2):
        for launch in launches:
            found = [row for row in rows if (row["batch"], row["launch"]) == (batch, launch)]
            dense = {row["baseline"]: row for row in found if row["method"] == "full"}
            assert set(dense) >= {"preallocated", "preallocated_packed"}
            assert dense["preallocated"]["speedup"] == 1.0
            for allocation in ("uniform", "ada"):
                ours = [row for row in found if row["allocation"] == allocation]
                assert {row["baseline"] for row in ours} == set(dense)
                for row in ours:
                    assert row["tok_s"] == pytest.approx(1000 * batch / row["ms"])
                    assert row["kv_bytes"] < 0.25 * dense["preallocated"]["kv_bytes"]
    assert {row["method"] for row in data["rows"] if row["what"] == "decode_attention"} >= {
        "packed", "gqa", "repeated", "packed, growing",
    }  # fmt: skip
