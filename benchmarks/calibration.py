"""How long `purekv calibrate` takes, and the plans it finds, where no codec is needed.

    python benchmarks/calibration.py --targets kv=0.1 prefill=3.16x --device cuda --plans FOLDER
    python benchmarks/calibration.py --targets kv=0.1 --n 2 --plans FOLDER --out seconds.json

The command's own calculation on the command's own samples, but drawn as pixels instead of read from
files. Plans are written to FOLDER, named after their targets.
"""

import argparse
import time
from pathlib import Path

from common import RESULTS, settings, write_results
from reference_suite import drawn

from purekv.loading import Checkpoint, fingerprint
from purekv.planning.calibrate import Calibration, make_plan
from purekv.planning.target import Target
from purekv.reference import default_checkpoint
from purekv.reference.data import SUITES, suite


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--targets", nargs="+", default=["kv=0.1", "prefill=3.16x"])
    parser.add_argument("--n", type=int, help="samples (default: 24, or 12 for a speed-up)")
    parser.add_argument("--tokens", choices=SUITES, default="576", help="visual tokens, about")
    parser.add_argument("--seed", type=int, default=700_000, help="of the samples")
    parser.add_argument("--plans", type=Path, required=True, help="folder for the plans")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    arguments = parser.parse_args()
    arguments.plans.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.find(str(arguments.model or default_checkpoint()))
    model = checkpoint.model(device=arguments.device, dtype=arguments.dtype)
    rows = []
    for text in arguments.targets:
        target = Target.parse(text)
        count = arguments.n or (12 if target.kind == "prefill" else 24)
        found = suite(arguments.tokens, count, arguments.seed)
        samples, read = drawn(found, arguments.seed, model.device)
        started = time.perf_counter()
        plan = make_plan(Calibration(model, checkpoint.processor(), samples, target, read=read))
        seconds = time.perf_counter() - started
        plan.write(arguments.plans / f"{text.replace('=', '_')}.json")
        rows.append({"target": text, "samples": count, "seconds": round(seconds, 1)})
        print(rows[-1], plan.settings, plan.expected, flush=True)
    run = {"dtype": str(model.dtype), "model": fingerprint(model)}
    write_results(arguments.out, settings(arguments) | run, rows)


if __name__ == "__main__":
    main()
