"""`purekv bench` as published: what compression costs and saves at Qwen2.5-VL-7B shapes.

    python benchmarks/prefill_overhead.py
    python benchmarks/prefill_overhead.py --shapes tiny --tokens 500 --out tiny.json

Further options are those of `purekv bench --help`.
"""

import sys

from common import RESULTS

from purekv.cli import main

PUBLISHED = {
    "--shapes": "qwen2.5-vl-7b",
    "--tokens": "16384,32768,65536",
    "--methods": "clie,snapkv",
    "--budgets": "0.2,0.1",
    "--phases": "lm_prefill,decode,overhead",
    "--out": str(RESULTS / "prefill_overhead.json"),
}

if __name__ == "__main__":
    main(["bench", *(word for pair in PUBLISHED.items() for word in pair), *sys.argv[1:]])
