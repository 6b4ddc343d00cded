"""`purekv data`: data sets of others in the format that `purekv eval` reads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from purekv.cli.errors import explains_errors
from purekv.cli.options import Debug, Json

app = typer.Typer(help="Data sets of others, for purekv eval.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Data sets of others, for purekv eval."""


@app.command()
@explains_errors
def avsd(
    file: Annotated[Path, typer.Argument(help="The dialogs, such as test_set4DSTC7-AVSD.json.")],
    media: Annotated[Path, typer.Option(help="Folder of the videos, named by image_id.")],
    out: Annotated[Path, typer.Option(help="The .jsonl to write.")],
    last: Annotated[
        bool,
        typer.Option("--last", help="Ask the last question only, behind the dialog before it."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Audio-visual scene-aware dialogs (DSTC7, DSTC8)."""
    from purekv.evals.avsd import read_avsd
    from purekv.evals.samples import write_samples

    dialogs = read_avsd(file, media, last)
    write_samples(out, dialogs.samples)
    for count, what in (
        (len(dialogs.missing), "whose video is missing"),
        (dialogs.undisclosed, "whose answers are undisclosed"),
    ):
        if count:
            typer.echo(f"left out: dialogs {what}, {count}", err=True)
    made = {
        "data": str(out),
        "samples": len(dialogs.samples),
        "questions": sum(len(sample.turns) for sample in dialogs.samples),
        "missing": dialogs.missing,
        "undisclosed": dialogs.undisclosed,
    }
    typer.echo(json.dumps(made) if as_json else out)
