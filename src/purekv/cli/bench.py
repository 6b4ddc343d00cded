"""`purekv bench`: what compression costs and saves, phase by phase."""

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from purekv.cli.arguments import (
    parse_budget,
    parse_counts,
    parse_source_layers,
    parse_window,
    parse_words,
)
from purekv.cli.errors import explains_errors
from purekv.cli.progress import step

if TYPE_CHECKING:
    from purekv.bench import Subject

SAMPLE = "sample"  # instead of a path: the clip that ships with purekv

SUBJECT, METHODS, MEASURING, OUTPUT = "Model and prompt", "Methods", "Measuring", "Output"


@explains_errors
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory. Default: the embedded reference model.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option(
            help="A video file. Default: sample, the clip that ships with purekv.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Random weights at the shapes of a model instead: qwen2.5-vl-7b or tiny.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated visual tokens of a prompt, about; the video is cut, or played "
            "again. Default: the video's own, or 1000 with --shapes.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Comma-separated prompts at once.", rich_help_panel=SUBJECT)
    ] = "1",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=SUBJECT)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=SUBJECT)
    ] = "auto",
    methods: Annotated[
        str, typer.Option(help="Comma-separated names.", rich_help_panel=METHODS)
    ] = "clie",
    budgets: Annotated[
        str,
        typer.Option(
            help="Comma-separated shares (0.2) or counts (200) of visual tokens.",
            rich_help_panel=METHODS,
        ),
    ] = "0.2",
    prefill: Annotated[
        str, typer.Option(help="Comma-separated attention patterns.", rich_help_panel=METHODS)
    ] = "dense",
    evict: Annotated[
        str, typer.Option(help="Comma-separated ways to evict.", rich_help_panel=METHODS)
    ] = "post",
    first_token: Annotated[
        str,
        typer.Option(
            help="exact, or compressed; the ablation shows both.", rich_help_panel=METHODS
        ),
    ] = "exact",
    source_layers: Annotated[
        str,
        typer.Option(help="Of CLIE: auto, or e.g. 2,8,14.", rich_help_panel=METHODS),
    ] = "auto",
    window: Annotated[
        str,
        typer.Option(
            help="Text that observes: question, or the last N tokens.", rich_help_panel=METHODS
        ),
    ] = "question",
    plan: Annotated[
        str | None, typer.Option(help="A calibrated plan's file.", rich_help_panel=METHODS)
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Comma-separated attention of the dense model: sdpa, flash, eager.",
            rich_help_panel=MEASURING,
        ),
    ] = "sdpa,flash,eager",
    phases: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, of decode_video, vision, lm_prefill, ttft, decode, overhead. "
            "Default: all.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Rounds that count, after a warm-up.", rich_help_panel=MEASURING)
    ] = 5,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens decoded in a round.", rich_help_panel=MEASURING)
    ] = 16,
    out: Annotated[
        Path | None, typer.Option(help="A file for the JSON as well.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show warnings and tracebacks.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Time, memory and where the milliseconds go, of the full cache and of each method in turn.

    purekv bench --shapes tiny --tokens 500 --methods clie,snapkv

    purekv bench --shapes qwen2.5-vl-7b --tokens 16000,32000 --batch 1,4 --out bench.json
    """
    import purekv
    from purekv.bench import (
        PHASES,
        Plan,
        check_budgets,
        check_out,
        measure_prompt,
        results,
        write,
    )
    from purekv.cli.bench_tables import show
    from purekv.cli.quiet import quiet
    from purekv.evals.methods import make_configs

    if not debug:
        quiet()
    configs = make_configs(
        parse_words("methods", methods),
        [parse_budget(word) for word in parse_words("budgets", budgets)],
        parse_words("prefill", prefill),
        parse_words("evict", evict),
        first_token=first_token,
        source_layers=parse_source_layers(source_layers),
        window=parse_window(window),
        plan=plan,
    )
    todo = Plan(
        tuple(configs),
        tuple(parse_words("baselines", baselines)),
        PHASES if phases is None else tuple(parse_words("phases", phases)),
        repeats,
        decode_tokens,
    )
    sizes: list[Any] = [1000] if shapes else [None]
    if tokens is not None:
        sizes = parse_counts("tokens", tokens)
    batches = parse_counts("batch", batch)
    if out is not None:
        check_out(out)
    subject = _subject(model, video, shapes, device, dtype)

    with step("reading the prompt"):
        rows = list(subject.media_rows(repeats if "decode_video" in todo.phases else 0))
        check_budgets(subject.config, subject.inputs(min(sizes)), todo)
    with step("loading the model"):
        loaded = subject.model()
    settings = {
        "model": subject.name,
        "random_weights": shapes is not None,
        "video": None if shapes else Path(video or SAMPLE).name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "weights_bytes": sum(weight.nbytes for weight in loaded.parameters()),
        "tokens": sizes,
        "batch": batches,
        "methods": [config.to_dict() for config in configs],
        "baselines": todo.baselines,
        "phases": todo.phases,
        "repeats": repeats,
        "decode_tokens": decode_tokens,
        "purekv": purekv.__version__,
    }
    for size, rows_at_once in product(sizes, batches):
        inputs = subject.inputs(size)
        what = f"measuring {size or 'the video as it is'}, batch {rows_at_once}"
        with step(what, counted=True) as progress:
            rows += measure_prompt(loaded, inputs, rows_at_once, todo, progress.advance)
        data = results(settings, rows, loaded.device)
        if out is not None:  # what a killed run has measured stays
            write(out, data)
    if as_json:
        typer.echo(json.dumps(data))
    else:
        show(rows)


def _subject(
    model: str | None, video: str | None, shapes: str | None, device: str, dtype: str
) -> "Subject":
    from purekv import PureKVError
    from purekv.bench import RandomSubject, VideoSubject
    from purekv.loading import Checkpoint, find_device
    from purekv.media import check_file
    from purekv.reference import default_checkpoint, sample_video

    if shapes is not None:
        for option, value in (("--model", model), ("--video", video)):
            if value is not None:
                raise PureKVError(
                    f"--shapes has random weights and pixels; leave out {option} or --shapes"
                )
        return RandomSubject(shapes, device, dtype)
    path = sample_video() if video in (None, SAMPLE) else Path(str(video))
    find_device(device)  # before the reference model is built, which takes a while
    check_file(path, "video")
    if model is None:
        with step("preparing the reference model") as progress:
            model = str(default_checkpoint(progress.say))
    return VideoSubject(Checkpoint.find(model), path, device, dtype)
