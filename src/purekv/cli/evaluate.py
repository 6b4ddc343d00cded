"""`purekv eval`: every method side by side, on any model and data."""

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from purekv.cli.arguments import parse_budget, parse_source_layers, parse_window
from purekv.cli.errors import explains_errors
from purekv.cli.progress import step

if TYPE_CHECKING:
    from purekv.evals import Sample

DATA, METHODS, MODEL, OUTPUT = "Data", "Methods", "Model", "Output"


@explains_errors
def evaluate(
    data: Annotated[
        Path,
        typer.Option(help="A data set's .jsonl, or the folder of one.", rich_help_panel=DATA),
    ],
    limit: Annotated[
        int | None,
        typer.Option(help="Samples, picked at random by --seed.", rich_help_panel=DATA),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the picks and the intervals.", rich_help_panel=DATA)
    ] = 0,
    methods: Annotated[
        str, typer.Option(help="Comma-separated names.", rich_help_panel=METHODS)
    ] = "clie,snapkv,streaming",
    budgets: Annotated[
        str,
        typer.Option(
            help="Comma-separated shares (0.2) or counts (200) of visual tokens.",
            rich_help_panel=METHODS,
        ),
    ] = "1.0,0.2,0.1",
    prefill: Annotated[
        str, typer.Option(help="Comma-separated attention patterns.", rich_help_panel=METHODS)
    ] = "dense",
    evict: Annotated[
        str, typer.Option(help="Comma-separated ways to evict.", rich_help_panel=METHODS)
    ] = "post",
    first_token: Annotated[
        str,
        typer.Option(
            help="compressed, so that even one-token answers feel the eviction; or exact.",
            rich_help_panel=METHODS,
        ),
    ] = "compressed",
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
    batch: Annotated[
        int, typer.Option(help="Samples prefilled together.", rich_help_panel=MODEL)
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the table and each sample's record.", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out's folder.", rich_help_panel=OUTPUT)
    ] = False,
    plots: Annotated[
        bool,
        typer.Option(
            "--plots",
            help="Draw the table into --out's folder, with a page that shows the pictures.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    speed_samples: Annotated[
        int,
        typer.Option(
            help="Samples on which each method is timed by itself; 0: none.", rich_help_panel=OUTPUT
        ),
    ] = 3,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show warnings and tracebacks.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Accuracy that methods keep at each budget, against the same model's full cache.

    purekv reference data DIR --n 200

    purekv eval --data DIR --methods clie,snapkv,h2o --budgets 1.0,0.2,0.1 --out RESULTS
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.cli import tables
    from purekv.cli.quiet import quiet
    from purekv.evals import evaluate as ask
    from purekv.evals import make_methods, summarise
    from purekv.evals.plots import require_matplotlib, write_plots
    from purekv.evals.speed import measure_speed
    from purekv.evals.store import Store
    from purekv.loading import Checkpoint, find_device, fingerprint
    from purekv.scoring import make_scorer

    if not debug:
        quiet()
    for name, value, least in (("limit", limit, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise PureKVError(f"{name}={value}; it must be at least {least}")
    if resume and out is None:
        raise PureKVError("--resume goes on in a folder; name it with --out")
    if plots:
        if out is None:
            raise PureKVError("--plots draws into a folder; name it with --out")
        require_matplotlib()
    configs = make_methods(
        _words(methods),
        [parse_budget(word) for word in _words(budgets)],
        prefills=_words(prefill),
        evicts=_words(evict),
        first_token=first_token,
        source_layers=parse_source_layers(source_layers),
        window=parse_window(window),
        plan=plan,
    )
    find_device(device)
    if data.is_dir():
        data = data / "data.jsonl"
    samples = _picked(data, limit, seed)
    if model is None:
        from purekv.reference import default_checkpoint

        with step("preparing the reference model") as progress:
            model = str(default_checkpoint(progress.say))
    checkpoint = Checkpoint.find(model)
    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    for config in configs:
        if isinstance(config, PureKVConfig):
            make_scorer(config.scorer, config.source_layers, num_layers)
    processor = checkpoint.processor()
    with step("loading the model"):
        loaded = checkpoint.model(device=device, dtype=dtype)

    store = None
    settings = {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "limit": limit,
        "seed": seed,
        "model": fingerprint(loaded),
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "batch": batch,
        "methods": [config.to_dict() for config in configs],
    }
    if out is not None:
        store = Store(out, settings, resume)
    records = dict(store.records) if store else {}
    with step("evaluating", counted=True) as progress:
        progress.advance(len(records), len(samples))
        for batch_records in ask(
            loaded, processor, samples, configs, batch_size=batch, done=records.copy()
        ):
            if store is not None:
                store.add(batch_records)
            records |= {record.id: record for record in batch_records}
            progress.advance(len(records), len(samples))
    skipped = [(s.id, records[s.id].skipped) for s in samples if records[s.id].skipped]
    for name, reason in skipped:
        typer.echo(f"skipped sample {name}: {reason}", err=True)
    if len(skipped) == len(samples):
        raise PureKVError(
            f"none of the {len(samples)} samples could be asked; the first: {skipped[0][1]}"
        )
    rows = summarise(samples, records, configs, seed)
    result: dict[str, Any] = {
        "config": settings,
        "skipped": [{"id": name, "reason": reason} for name, reason in skipped],
        "rows": rows,
    }
    if store is not None:
        store.sort(sample.id for sample in samples)
        store.write("results.json", result)
    asked = [sample for sample in samples if not records[sample.id].skipped]
    if speed_samples > 0:
        with step(f"timing on {min(speed_samples, len(asked))} samples"):
            timing = measure_speed(loaded, processor, asked[:speed_samples], configs)
        if store is not None:
            store.write("timing.json", timing)
        rows = [row | times for row, times in zip(rows, timing, strict=True)]
    if plots and out is not None:
        with step("drawing"):
            page = write_plots(out)
        typer.echo(f"pictures: {page}", err=True)
    if as_json:
        typer.echo(json.dumps(_environment(loaded) | result | {"rows": rows}))
    else:
        tables.show_evaluation(rows)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _picked(data: Path, limit: int | None, seed: int) -> "list[Sample]":
    """So many samples, in the file's order."""
    from purekv import PureKVError
    from purekv.evals import read_samples

    samples = read_samples(data)
    if not samples:
        raise PureKVError(f"{data} has no samples; a line is one, see docs/evaluation.md")
    if limit is None or limit >= len(samples):
        return samples
    chosen = random.Random(seed).sample(range(len(samples)), limit)
    return [samples[number] for number in sorted(chosen)]


def _environment(model: Any) -> dict[str, str]:
    import torch
    import transformers

    import purekv

    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "purekv": purekv.__version__,
    }
