"""`purekv run`: ask questions about videos and images on a compressed KV cache."""

import json
import time
from typing import Annotated

import typer

from purekv.cli import options
from purekv.cli.arguments import (
    check_positive,
    parse_given_budget,
    parse_source_layers,
    parse_spatiotemporal,
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
def run(
    video: options.Videos = None,
    image: options.Images = None,
    ask: Annotated[
        list[str] | None, option(MEDIA, "Questions, in turn; each continues the chat.")
    ] = None,
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
    prefill: options.Prefill = "dense",
    spatiotemporal: options.SpatioTemporal = "",
    evict: options.Evict = "post",
    prune: options.Prune = None,
    scope: options.Scope = "visual",
    first_token: options.FirstToken = "exact",
    plan: options.Plan = None,
    tolerance: options.Tolerance = None,
    certificate: options.Certificate = False,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = 64,
    compare: Annotated[
        bool, option(OUTPUT, "Ask the uncompressed model as well.", "--compare")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask questions about videos and images, on a fraction of the KV cache.

    purekv run --video sample --compare

    purekv run --image a.png b.png --ask "Which is older?" --ask "Why?" --budget 0.1
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.cli import tables
    from purekv.cli.compare import Request, answer, to_json
    from purekv.cli.quiet import quiet
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
        spatiotemporal=parse_spatiotemporal(spatiotemporal),
        prefill=prefill,
        evict=evict,
        prune=prune,
        scope=scope,
        first_token=first_token,
        plan=plan,
        tolerance=tolerance,
        certificate=certificate,
    )
    check_positive("max_new_tokens", max_new_tokens)
    find_device(device)
    paths = [video_path(name) for name in video or []]
    if not paths and not image:
        raise PureKVError("nothing to look at; give --video FILE or --image FILE")
    questions = questions_about(video or [], ask or [])
    for path in paths:
        check_file(path, "video")
    images = [read_image(path) for path in image or []]

    checkpoint = find_checkpoint(model)
    check_layers(checkpoint, [config])
    processor = checkpoint.processor()
    began = time.perf_counter()
    clips = read_clips(
        processor,
        paths,
        fps=fps,
        max_frames=max_frames,
        max_pixels=max_pixels,
        start=start,
        end=end,
    )
    decode_video = time.perf_counter() - began
    with step("loading the model"):
        loaded = checkpoint.model(device=device, dtype=dtype)
    request = Request(
        loaded, processor, clips, images, questions, max_pixels, max_new_tokens, decode_video
    )
    result = answer(request, config, compare=compare)
    if as_json:
        typer.echo(json.dumps(to_json(result, request, config, checkpoint.name)))
    else:
        tables.show(result, request)
