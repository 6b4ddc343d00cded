"""`purekv calibrate`: a plan for one model, from a few dozen samples."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from purekv.cli import options
from purekv.cli.arguments import check_positive
from purekv.cli.errors import explains_errors
from purekv.cli.inputs import find_checkpoint
from purekv.cli.options import COMPRESSION, OUTPUT, option
from purekv.cli.progress import step

DATA = "Data"


@explains_errors
def calibrate(
    out: Annotated[Path, option(OUTPUT, "The plan: a JSON file.")],
    target: Annotated[
        str, option(COMPRESSION, 'What to reach: "kv=0.1", "prefill=3.16x" or "retention=0.99".')
    ] = "kv=0.1",
    data: Annotated[
        Path | None,
        option(
            DATA, "A data set's .jsonl, or the folder of one. Default: generated videos, pages."
        ),
    ] = None,
    n: Annotated[int | None, option(DATA, "Samples. Default: 24, or 12 for a speed-up.")] = None,
    seed: Annotated[int, option(DATA, "Of the generated samples.")] = 700_000,
    suite: Annotated[
        str, option(DATA, "Of the generated samples: about so many visual tokens.")
    ] = ("576"),
    tokens: Annotated[
        int, option(COMPRESSION, "Visual tokens of a prompt for which a speed-up is meant.")
    ] = 65536,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure what each choice costs this model, and write the plan that costs it least.

    purekv calibrate --target kv=0.1 --out plan.json

    purekv run --video sample --plan plan.json

    A killed calibration goes on where it was, when its command is repeated.
    """
    from purekv import PureKVError
    from purekv.cli.quiet import quiet
    from purekv.evals import read_samples
    from purekv.loading import find_device
    from purekv.planning.calibrate import Calibration, make_plan
    from purekv.planning.target import Target
    from purekv.reference import write_dataset

    if not debug:
        quiet()
    goal = Target.parse(target)
    count = n if n is not None else 12 if goal.kind == "prefill" else 24
    check_positive("n", count)
    check_positive("tokens", tokens)
    find_device(device)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise PureKVError(f"{out} cannot be written; name a file in a folder that exists")
    checkpoint = find_checkpoint(model)
    processor = checkpoint.processor()
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            with step("drawing samples", counted=True) as progress:
                data = write_dataset(folder, count, seed, tokens=suite, progress=progress.advance)
        samples = read_samples(data / "data.jsonl" if data.is_dir() else data, count)
        if not samples:
            raise PureKVError(f"{data} holds no samples")
        with step("loading the model"):
            loaded = checkpoint.model(device=device, dtype=dtype)
        store = out.with_name(f"{out.name}.measured")
        with step("measuring", counted=True) as progress:
            plan = make_plan(
                Calibration(loaded, processor, samples, goal, tokens=tokens, store=store),
                progress.advance,
            )
    plan.write(out)
    if as_json:
        typer.echo(json.dumps({"plan": str(out), **plan.to_dict()}))
    else:
        typer.echo(f"{out}: {json.dumps(plan.settings)}")
