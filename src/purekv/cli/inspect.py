"""`purekv inspect`: a page that shows which tokens a question kept, layer by layer."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from purekv.cli import options
from purekv.cli.arguments import (
    check_positive,
    parse_given_budget,
    parse_source_layers,
    parse_window,
)
from purekv.cli.errors import explains_errors
from purekv.cli.inputs import (
    check_layers,
    find_checkpoint,
    questions_about,
    read_clips,
    video_path,
)
from purekv.cli.options import MEDIA, OUTPUT, option
from purekv.cli.progress import step


@explains_errors
def inspect(
    out: Annotated[Path, option(OUTPUT, "The page: an HTML file.")],
    video: options.Videos = None,
    image: options.Images = None,
    ask: Annotated[str | None, option(MEDIA, "The question.")] = None,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    max_pixels: options.MaxPixels = None,
    start: options.Start = 0.0,
    end: options.End = None,
    budget: options.Budget = None,
    scorer: options.Scorer = "clie",
    allocation: options.Allocation = "uniform",
    source_layers: options.SourceLayers = "auto",
    window: options.Window = "question",
    first_token: options.FirstToken = "compressed",
    plan: options.Plan = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = 64,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a page with the kept tokens on the frames, for every layer and head.

    purekv inspect --video sample --out sample.html

    purekv inspect --image page.png --ask "What is the total?" --budget 0.1 --out page.html
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.cli.quiet import quiet
    from purekv.inspect.collect import check_all_computed
    from purekv.inspect.page import figures, make_page, moments, write_page
    from purekv.inspect.prompt import inspect_prompt
    from purekv.loading import find_device
    from purekv.media import check_file, read_image

    if not debug:
        quiet()
    config = PureKVConfig(
        budget=parse_given_budget(budget),
        allocation=allocation,
        scorer=scorer,
        source_layers=parse_source_layers(source_layers),
        window=parse_window(window),
        first_token=first_token,
        plan=plan,
    )
    check_all_computed(config)
    if config.budget == 1.0:
        raise PureKVError("budget=1.0 keeps everything, so there is nothing to look at; lower it")
    check_positive("max_new_tokens", max_new_tokens)
    find_device(device)
    _check_out(out)
    paths = [video_path(name) for name in video or []]
    if not paths and not image:
        raise PureKVError("nothing to look at; give --video FILE or --image FILE")
    question = questions_about(video or [], [] if ask is None else [ask])[0]
    for path in paths:
        check_file(path, "video")
    images = [(Path(name).name, read_image(name)) for name in image or []]

    checkpoint = find_checkpoint(model)
    check_layers(checkpoint, [config])
    processor = checkpoint.processor()
    read = read_clips(
        processor,
        paths,
        fps=fps,
        max_frames=max_frames,
        max_pixels=max_pixels,
        start=start,
        end=end,
    )
    clips = [(path.name, clip) for path, clip in zip(paths, read, strict=True)]
    with step("loading the model"):
        loaded = checkpoint.model(device=device, dtype=dtype)
    with step("looking at every layer") as progress:
        inspection = inspect_prompt(
            loaded,
            processor,
            question,
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
            f"{model or 'the embedded reference model'}"
        )
        write_page(out, make_page(inspection, moments(inspection, clips, images), subject))
    if as_json:
        page = {"page": str(out), "page_bytes": out.stat().st_size, "model": checkpoint.name}
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
