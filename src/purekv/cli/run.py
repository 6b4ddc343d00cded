"""`purekv run`: ask questions about videos and images on a compressed KV cache."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from purekv.cli.arguments import parse_budget, parse_source_layers, parse_window
from purekv.cli.errors import explains_errors
from purekv.cli.progress import step

if TYPE_CHECKING:
    from purekv.media import Clip

SAMPLE = "sample"  # instead of a path: the clip that ships with purekv

MEDIA, COMPRESSION, MODEL, OUTPUT = "Media", "Compression", "Model", "Output"


@explains_errors
def run(
    video: Annotated[
        list[str] | None,
        typer.Option(
            help="Video files; 'sample' is the clip that ships with purekv, questions included.",
            rich_help_panel=MEDIA,
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Image files.", rich_help_panel=MEDIA)
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Questions, in turn; each continues the chat.", rich_help_panel=MEDIA),
    ] = None,
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
        float | None,
        typer.Option(help="Second at which to end.", rich_help_panel=MEDIA),
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
            help="Text that observes: question, or the last N tokens.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "question",
    prefill: Annotated[
        str, typer.Option(help="Attention pattern of the prefill.", rich_help_panel=COMPRESSION)
    ] = "dense",
    evict: Annotated[
        str, typer.Option(help="When entries leave the cache.", rich_help_panel=COMPRESSION)
    ] = "post",
    first_token: Annotated[
        str,
        typer.Option(
            help="exact, or compressed: let the first answer token feel the eviction too.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "exact",
    plan: Annotated[
        str | None, typer.Option(help="A calibrated plan's file.", rich_help_panel=COMPRESSION)
    ] = None,
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
        str,
        typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL),
    ] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=MODEL)
    ] = 64,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Ask the uncompressed model as well.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show warnings and tracebacks.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Ask questions about videos and images, on a fraction of the KV cache.

    purekv run --video sample --compare

    purekv run --image a.png b.png --ask "Which is older?" --ask "Why?" --budget 0.1
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.cli import tables
    from purekv.cli.compare import Request, answer, to_json
    from purekv.cli.quiet import quiet
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
        prefill=prefill,
        evict=evict,
        first_token=first_token,
        plan=plan,
    )
    if max_new_tokens < 1:
        raise PureKVError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
    find_device(device)
    paths, questions = _videos(video or []), ask or _sample_questions(video or [])
    if not paths and not image:
        raise PureKVError("nothing to look at; give --video FILE or --image FILE")
    if not questions or not all(question.strip() for question in questions):
        raise PureKVError('nothing to answer; give --ask "a question"')
    for path in paths:
        check_file(path, "video")
    images = [read_image(path) for path in image or []]

    if model is None:
        from purekv.reference import default_checkpoint

        with step("preparing the reference model") as progress:
            model = str(default_checkpoint(progress.say))
    checkpoint = Checkpoint.find(model)
    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    make_scorer(config.scorer, config.source_layers, num_layers)  # refuses layers out of range
    processor = checkpoint.processor()
    clips: list[Clip] = []
    began = time.perf_counter()
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
        clips.append(clip)
    decode_video = time.perf_counter() - began
    with step("loading the model"):
        loaded = checkpoint.model(device=device, dtype=dtype)
    request = Request(
        loaded, processor, clips, images, questions, max_pixels, max_new_tokens, decode_video
    )
    result = answer(request, config, compare=compare)
    if as_json:
        typer.echo(json.dumps(to_json(result, request, config, model)))
    else:
        tables.show(result, request)


def _videos(names: list[str]) -> list[Path]:
    if SAMPLE in names:
        from purekv.reference import sample_video

        return [Path(sample_video() if name == SAMPLE else name) for name in names]
    return [Path(name) for name in names]


def _sample_questions(names: list[str]) -> list[str]:
    if SAMPLE in names:
        from purekv.reference import sample_questions

        return list(sample_questions())
    return []
