"""`purekv reference`: the embedded model and its questions."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from purekv.cli.errors import explains_errors
from purekv.cli.options import Debug, Json
from purekv.cli.progress import step
from purekv.cli.quiet import quiet
from purekv.errors import PureKVError

if TYPE_CHECKING:
    from purekv.reference.data import Geometry

app = typer.Typer(help="The embedded reference model and its questions.", no_args_is_help=True)


@app.command()
@explains_errors
def build(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of trained shards, such as training/second.", show_default="the package's"
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Assemble the reference model as a standard checkpoint directory."""
    from purekv.reference import build as build_checkpoint
    from purekv.reference.model import WEIGHTS

    if not debug:
        quiet()
    with step("building the reference model") as progress:
        build_checkpoint(directory, progress.say, weights=weights or WEIGHTS)
    typer.echo(json.dumps({"directory": str(directory)}) if as_json else directory)


@app.command()
@explains_errors
def data(
    directory: Annotated[Path, typer.Argument(help="Where to write the files and data.jsonl.")],
    n: Annotated[int, typer.Option("--n", help="Number of samples.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    tokens: Annotated[
        str | None,
        typer.Option(help="Visual tokens of a prompt, about: 576, 1k, 2k, 4k.", show_default="1k"),
    ] = None,
    level: Annotated[str, typer.Option(help="easy, standard or hard.")] = "standard",
    media: Annotated[
        str | None,
        typer.Option(help="One kind of prompt in place of --tokens' mix: video, image or page."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="With --media video: frames of each.", show_default="20")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="With --media: width and height in pixels.", show_default="280"),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="With --media: how many in a prompt.", show_default="1"),
    ] = None,
    audio: Annotated[
        bool,
        typer.Option("--audio", help="Videos with sound, and questions that need to hear it."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write videos and images with questions that the reference model can be measured on."""
    from purekv.reference import write_dataset

    geometry = _geometry(tokens, media, frames, size, count)
    tokens = tokens or "1k"
    with step("drawing samples") as progress:
        path = write_dataset(
            directory, n, seed, tokens, geometry, level, progress=progress.advance, audio=audio
        )
    made: dict[str, object] = {"data": str(path), "n": n, "seed": seed, "level": level}
    if geometry is None:
        made["tokens"] = tokens
    else:
        made |= {"media": media, "frames": geometry.frames}
        made |= {"size": geometry.size, "count": geometry.count}
    if audio:
        made["audio"] = True
    typer.echo(json.dumps(made) if as_json else path)


def _geometry(
    tokens: str | None, media: str | None, frames: int | None, size: int | None, count: int | None
) -> "Geometry | None":
    """What the options say of one kind of prompt; None where they ask for a suite."""
    from purekv.reference.data import Geometry

    options = {"--frames": frames, "--size": size, "--count": count}
    given = [name for name, value in options.items() if value is not None]
    if media is None:
        if given:
            raise PureKVError(f"{given[0]} is of one kind of prompt; say which, e.g. --media video")
        return None
    if tokens is not None:
        raise PureKVError("--tokens is a mix of media, --media one kind; leave one of them out")
    if media not in ("video", "image", "page"):
        raise PureKVError(f"media={media!r}: use video, image or page")
    if media != "video" and frames is not None:
        raise PureKVError(f"--frames is of videos; leave it out with --media {media}")
    default = 20 if media == "video" else 1
    return Geometry(
        media,
        default if frames is None else frames,
        280 if size is None else size,
        1 if count is None else count,
    )
