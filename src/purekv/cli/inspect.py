"""`purekv inspect`: a page that shows which tokens a question kept, layer by layer."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from purekv.cli.arguments import parse_budget, parse_source_layers, parse_window
from purekv.cli.errors import explains_errors
from purekv.cli.progress import step
from purekv.cli.run import COMPRESSION, MEDIA, MODEL, OUTPUT, SAMPLE

if TYPE_CHECKING:
    from purekv.media import Clip


@explains_errors
def inspect(
    out: Annotated[Path, typer.Option(help="The page: an HTML file.", rich_help_panel=OUTPUT)],
    video: Annotated[
        list[str] | None,
        typer.Option(
            help="Video files; 'sample' is the clip that ships with purekv, question included.",
            rich_help_panel=MEDIA,
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Image files.", rich_help_panel=MEDIA)
    ] = None,
    ask: Annotated[str | None, typer.Option(help="The question.", rich_help_panel=MEDIA)] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames sampled per second. Default: the model's own.", rich_help_panel=MEDIA
        ),
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(
            help="Most frames of a video. Default: the model's own.", rich_help_panel=MEDIA
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Most pixels of a frame or image. Default: the model's own.", rich_help_panel=MEDIA
        ),
    ] = None,
    start: Annotated[
        float, typer.Option(help="Second at which to start.", rich_help_panel=MEDIA)
    ] = 0.0,
    end: Annotated[
        float | None, typer.Option(help="Second at which to end.", rich_help_panel=MEDIA)
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Visual tokens to keep: a share (0.2) or a count (200).",
            rich_help_panel=COMPRESSION,
        ),
    ] = "0.2",
    scorer: Annotated[
        str, typer.Option(help="How importance is estimated.", rich_help_panel=COMPRESSION)
    ] = "clie",
    allocation: Annotated[
        str,
        typer.Option(
            help="How the budget is spread over layers and heads: uniform, pyramid or ada.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "uniform",
    source_layers: Annotated[
        str,
        typer.Option(
            help="Layers whose attention is measured: auto, or e.g. 2,8,14.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "auto",
    window: Annotated[
        str,
        typer.Option(
            help="Text that observes: question, or the last N tokens.", rich_help_panel=COMPRESSION
        ),
    ] = "question",
    first_token: Annotated[
        str,
        typer.Option(
            help="compressed, so that all of the answer feels the eviction; or exact.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "compressed",
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory. Default: the embedded reference model.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)
    ] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=MODEL)
    ] = 64,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show warnings and tracebacks.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Write a page with the kept tokens on the frames, for every layer and head.

    purekv inspect --video sample --out sample.html

    purekv inspect --image page.png --ask "What is the total?" --budget 0.1 --out page.html
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.cli.quiet import quiet
    from purekv.inspect.page import figures, make_page, moments, write_page
    from purekv.inspect.prompt import inspect_prompt
    from purekv.loading import Checkpoint, find_device
    from purekv.media import check_file, read_image
    from purekv.scoring import make_scorer
    from purekv.session import read_clip

    if not debug:
        quiet()
    config = PureKVConfig(
        budget=parse_budget(budget),
        allocation=allocation,
        scorer=scorer,
        source_layers=parse_source_layers(source_layers),
        window=parse_window(window),
        first_token=first_token,
    )
    if config.budget == 1.0:
        raise PureKVError("budget=1.0 keeps everything, so there is nothing to look at; lower it")
    if max_new_tokens < 1:
        raise PureKVError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    find_device(device)
    _check_out(out)
    names = video or []
    if not names and not image:
        raise PureKVError("nothing to look at; give --video FILE or --image FILE")
    paths = [Path(name) for name in names]
    if SAMPLE in names:
        from purekv.reference import sample_questions, sample_video

        paths = [Path(sample_video() if name == SAMPLE else name) for name in names]
        ask = sample_questions()[0] if ask is None else ask
    if not ask or not ask.strip():
        raise PureKVError('nothing to answer; give --ask "a question"')
    for path in paths:
        check_file(path, "video")
    images = [(Path(name).name, read_image(name)) for name in image or []]

    if model is None:
        from purekv.reference import default_checkpoint

        with step("preparing the reference model") as progress:
            model = str(default_checkpoint(progress.say))
            model_name = "the embedded reference model"
    else:
        model_name = model
    checkpoint = Checkpoint.find(model)
    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    make_scorer(config.scorer, config.source_layers, num_layers)  # refuses layers out of range
    processor = checkpoint.processor()
    clips: list[tuple[str, Clip]] = []
    for path in paths:
        with step(f"decoding {path.name}") as progress:
            clip = read_clip(
                processor,
                path,
                fps=fps,
                max_frames=max_frames,
                max_pixels=max_pixels,
                start=start,
                end=end,
                progress=progress.advance,
            )
        clips.append((path.name, clip))
    with step("loading the model"):
        loaded = checkpoint.model(device=device, dtype=dtype)
    with step("looking at every layer") as progress:
        inspection = inspect_prompt(
            loaded,
            processor,
            ask,
            config,
            videos=[clip for _, clip in clips],
            images=[picture for _, picture in images],
            max_pixels=max_pixels,
            max_new_tokens=max_new_tokens,
            say=progress.say,
        )
        report = inspection.report
        media = ", ".join(name for name, _ in [*clips, *images])
        subject = (
            f"{media}: {report.visual_tokens[0]} visual tokens, {report.kept_visual_tokens[0]} "
            f"kept a head by {config.scorer}; KV cache {report.compression:.2f}x smaller; "
            f"{model_name}"
        )
        write_page(out, make_page(inspection, moments(inspection, clips, images), subject))
    if as_json:
        page = {"page": str(out), "page_bytes": out.stat().st_size, "model": model}
        typer.echo(json.dumps(page | figures(inspection)))
    else:
        typer.echo(out)


def _check_out(path: Path) -> None:
    from purekv import PureKVError

    if path.is_dir():
        raise PureKVError(f"{path} is a directory; name a file, e.g. {path / 'inspect.html'}")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PureKVError(f"{path} cannot be written; name a file in a folder that is yours")
