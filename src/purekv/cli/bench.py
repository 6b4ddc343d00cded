"""`purekv bench`: what compression costs and saves, phase by phase."""

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from purekv.cli import options
from purekv.cli.arguments import (
    parse_budget,
    parse_counts,
    parse_source_layers,
    parse_spatiotemporal,
    parse_window,
    parse_words,
)
from purekv.cli.errors import explains_errors
from purekv.cli.inputs import SAMPLE, find_checkpoint, video_path
from purekv.cli.options import COMPRESSION, MODEL, OUTPUT, option
from purekv.cli.progress import step

if TYPE_CHECKING:
    from purekv.bench import Subject

PROMPT, MEASURING = "Prompt", "Measuring"


@explains_errors
def bench(
    model: options.Model = None,
    video: Annotated[
        str | None,
        option(PROMPT, "A video file. Default: sample, the clip that ships with purekv."),
    ] = None,
    shapes: Annotated[
        str | None,
        option(MODEL, "Random weights at the shapes of a model instead: qwen2.5-vl-7b or tiny."),
    ] = None,
    tokens: Annotated[
        str | None,
        option(
            PROMPT,
            "Comma-separated visual tokens of a prompt, about; the video is cut, or played "
            "again. Default: the video's own, or 1000 with --shapes.",
        ),
    ] = None,
    batch: Annotated[str, option(PROMPT, "Comma-separated prompts at once.")] = "1",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    methods: options.Methods = "clie",
    budgets: options.Budgets = "0.2",
    prefill: options.Prefills = "dense",
    spatiotemporal: options.SpatioTemporal = "",
    evict: options.Evicts = "post",
    prune: options.Prune = None,
    first_token: Annotated[
        str, option(COMPRESSION, "exact, or compressed; the ablation shows both.")
    ] = "exact",
    source_layers: options.SourceLayers = "auto",
    window: options.Window = "question",
    plan: options.Plan = None,
    certificate: options.Certificate = False,
    baselines: Annotated[
        str,
        option(MEASURING, "Comma-separated attention of the dense model: sdpa, flash, eager."),
    ] = "sdpa,flash,eager",
    phases: Annotated[
        str | None,
        option(
            MEASURING,
            "Comma-separated, of decode_video, vision, lm_prefill, ttft, decode, overhead. "
            "Default: all.",
        ),
    ] = None,
    repeats: Annotated[int, option(MEASURING, "Rounds that count, after a warm-up.")] = 5,
    decode_tokens: Annotated[int, option(MEASURING, "Tokens decoded in a round.")] = 16,
    out: Annotated[Path | None, option(OUTPUT, "A file for the JSON as well.")] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
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
        spatiotemporal=parse_spatiotemporal(spatiotemporal),
        plan=plan,
        prune=prune,
        certificate=certificate,
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
    from purekv.loading import find_device
    from purekv.media import check_file

    if shapes is not None:
        for option, value in (("--model", model), ("--video", video)):
            if value is not None:
                raise PureKVError(
                    f"--shapes has random weights and pixels; leave out {option} or --shapes"
                )
        return RandomSubject(shapes, device, dtype)
    path = video_path(SAMPLE if video is None else video)
    find_device(device)  # before the reference model is built, which takes a while
    check_file(path, "video")
    return VideoSubject(find_checkpoint(model), path, device, dtype)
