"""`purekv reference`: the embedded model and its questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from purekv.cli.errors import explains_errors
from purekv.cli.progress import step
from purekv.cli.quiet import quiet

app = typer.Typer(help="The embedded reference model and its questions.", no_args_is_help=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
@explains_errors
def build(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Assemble the reference model as a standard checkpoint directory."""
    from purekv.reference import build as build_checkpoint

    if not debug:
        quiet()
    with step("building the reference model") as progress:
        build_checkpoint(directory, progress.say)
    typer.echo(json.dumps({"directory": str(directory)}) if as_json else directory)


@app.command()
@explains_errors
def data(
    directory: Annotated[Path, typer.Argument(help="Where to write the files and data.jsonl.")],
    n: Annotated[int, typer.Option("--n", help="Number of samples.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames a video; 1 writes images.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 280,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write videos with questions and answers that the reference model can be measured on."""
    from purekv.reference import write_dataset

    with step("drawing samples") as progress:
        path = write_dataset(directory, n, seed, frames, size, progress=progress.advance)
    typer.echo(json.dumps({"data": str(path), "n": n, "seed": seed}) if as_json else path)
