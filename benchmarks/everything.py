"""Make the published results anew, as many at a time as there are GPUs.

    python benchmarks/everything.py --list                            # the commands; runs nothing
    python benchmarks/everything.py --second DIR --out NEW            # all of them
    python benchmarks/everything.py --only decode vision --out NEW --minutes 9

Each result is made by a script of this folder, in a process of its own with GPUs of its own, and
appears in --out whole or not at all, beside a log; NAME.part.json is what a broken-off run left.
What is there is not made again: a run that was broken off goes on when it is repeated.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS

HERE = Path(__file__).parent
SUITE = "reference_suite.py --level full --draw --forced --workers 2 --dtype bfloat16 --device cuda"
SECOND = "--model {second} --plan ../training/second/plan.json"
MODES = f"{SUITE} --level modes --tokens 4k --batch 16 --prune 0.4 --budgets 0.1"
TIMED = "prefill_overhead.py --budgets 0.2 --baselines sdpa --repeats 2"
PRUNED = f"{TIMED} --tokens 65536 --phases lm_prefill --repeats 3"
EVERY = (
    "clie,snapkv,pyramidkv,adakv,expected_attention,key_diff,infinipot_v,value_norm,streaming,"
    "random,fastv,evs"
)
OBSERVING = "clie,snapkv,expected_attention,key_diff,infinipot_v"
LONG = "--tokens 32768,65536,131072 --phases lm_prefill"
SHORT = "--tokens 128,256,512,1024,2048,4096,8192,16384 --phases lm_prefill"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"


@dataclass(frozen=True)
class Result:
    """Python's arguments; `{second}` is the second reference model's checkpoint, `{out}` where
    results go."""

    words: str
    gpus: int = 1


MADE = {
    "reference_1k": Result(f"{SUITE} --tokens 1k --plan reference"),
    "second_1k": Result(f"{SUITE} --tokens 1k {SECOND}"),
    "reference_4k": Result(f"{SUITE} --tokens 4k --plan reference --batch 16"),
    "second_4k": Result(f"{SUITE} --tokens 4k {SECOND} --batch 16"),
    "modes_1k": Result(f"{SUITE} --level modes --tokens 1k --plan reference_fast"),
    "modes_4k": Result(f"{MODES} --plan reference reference_fast"),
    "second_modes_4k": Result(f"{MODES} {SECOND} ../training/second/fast.json"),
    "calibration": Result("calibration.py --plans {out}/plans --device cuda --dtype bfloat16"),
    "attention_facts": Result("attention_facts.py"),
    "certificate": Result("certificate.py --plan reference"),
    "prefill_overhead": Result("prefill_overhead.py"),
    "methods_16k": Result(
        f"{TIMED} --tokens 16384 --phases lm_prefill,overhead --methods {EVERY},h2o,vatp"
    ),
    "methods_64k": Result(
        f"{TIMED} --tokens 65536 --phases lm_prefill,overhead --methods {OBSERVING}"
    ),
    "methods_long": Result(f"{TIMED} {LONG} --methods {EVERY}"),
    "one_source": Result(
        f"{TIMED} --tokens 65536 --phases lm_prefill,overhead --source-layers 2 --methods clie"
    ),
    "one_source_0": Result(
        f"{TIMED} --tokens 65536 --phases overhead --source-layers 0 --methods clie"
    ),
    "automatic": Result(
        f"{TIMED} {SHORT} --methods clie --budgets 1.0 --prefill spatiotemporal --repeats 31"
    ),
    "pruned": Result(f"{PRUNED} --budgets 0.4 --methods evs"),
    "pruned_clie": Result(f"{PRUNED} --budgets 0.1 --prune 0.4 --methods clie_rare"),
    "longest": Result("longest.py"),
    "sparse_prefill": Result("sparse_prefill.py"),
    "decode": Result("decode.py"),
    "vision": Result("vision.py"),
    "tensor_parallel_1": Result(f"{TORCHRUN} 1 {HERE / 'tensor_parallel.py'}"),
    "tensor_parallel_2": Result(f"{TORCHRUN} 2 {HERE / 'tensor_parallel.py'}", gpus=2),
}


class Running:
    """One result in the making."""

    def __init__(self, name: str, words: list[str], gpus: list[int], out: Path) -> None:
        self.name, self.gpus, self.started = name, gpus, time.monotonic()
        visible = ",".join(map(str, gpus))
        with (out / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=HERE, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def stop(self) -> None:
        self.process.terminate()  # torchrun ends its ranks, which have sessions of their own
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def make(names: list[str], gpus: int, second: Path | None, out: Path, minutes: float) -> list[str]:
    """Runs what fits beside one another, in order; returns the names of what failed."""
    free, waiting = list(range(gpus)), list(names)
    running: list[Running] = []
    failed: list[str] = []
    end = time.monotonic() + 60 * minutes
    try:
        while running or waiting:
            while waiting and MADE[waiting[0]].gpus <= len(free):
                name = waiting.pop(0)
                taken = [free.pop(0) for _ in range(MADE[name].gpus)]
                running.append(Running(name, words(name, second, out), taken, out))
                print(f"{name}: started", file=sys.stderr)
            time.sleep(0.2)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.extend(one.gpus)
                good = one.process.returncode == 0
                if good:
                    _part(out, one.name).replace(out / f"{one.name}.json")
                took = f"{time.monotonic() - one.started:.0f} s"
                print(f"{one.name}: {'done' if good else 'FAILED'}, {took}", file=sys.stderr)
                failed += [] if good else [one.name]
            if time.monotonic() > end:
                return [*failed, *(one.name for one in running), *waiting]
    finally:
        for one in running:
            one.stop()
    return failed


def words(name: str, second: Path | None, out: Path) -> list[str]:
    made = [word.format(second=second, out=out) for word in MADE[name].words.split()]
    return [*made, "--out", str(_part(out, name))]


def _part(out: Path, name: str) -> Path:
    return out / f"{name}.part.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=MADE, metavar="RESULT", default=list(MADE))
    parser.add_argument("--second", type=Path, help="checkpoint of the second reference model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop everything then")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    a = parser.parse_args()
    out = a.out.resolve()
    second = a.second.resolve() if a.second else None
    names = [name for name in a.only if not (out / f"{name}.json").exists()]
    if a.list:
        for name in a.only:
            print(f"{name}: python {' '.join(words(name, second, out))}")
        return
    if any(MADE[name].gpus > a.gpus for name in names):
        wide = [name for name in names if MADE[name].gpus > a.gpus]
        parser.error(f"{', '.join(wide)}: more GPUs than the {a.gpus} here; leave out with --only")
    if second is None and any("{second}" in MADE[name].words for name in names):
        parser.error(
            "name the second model's checkpoint with --second, or leave it out with --only"
        )
    out.mkdir(parents=True, exist_ok=True)
    if failed := make(names, a.gpus, second, out, a.minutes):
        sys.exit(f"not made: {', '.join(failed)}; see their logs in {a.out}")


if __name__ == "__main__":
    main()
