"""`purekv eval`: every method side by side, on any model and data."""

import hashlib
import json
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from purekv.cli import options
from purekv.cli.arguments import (
    check_positive,
    parse_budget,
    parse_source_layers,
    parse_spatiotemporal,
    parse_window,
    split_words,
)
from purekv.cli.errors import explains_errors
from purekv.cli.inputs import check_layers, find_actors, find_checkpoint, from_anywhere
from purekv.cli.options import DATA, MODEL, OUTPUT, PROCESSES, option
from purekv.cli.progress import step

if TYPE_CHECKING:
    from purekv.evals import Sample


@explains_errors
def evaluate(
    data: Annotated[Path, option(DATA, "A data set's .jsonl, or the folder of one.")],
    limit: Annotated[int | None, option(DATA, "Samples, picked at random by --seed.")] = None,
    seed: Annotated[int, option(DATA, "Of the picks and the intervals.")] = 0,
    methods: options.Methods = "clie,snapkv,streaming",
    budgets: options.Budgets = "1.0,0.2,0.1",
    prefill: options.Prefills = "dense",
    spatiotemporal: options.SpatioTemporal = "",
    evict: options.Evicts = "post",
    prune: options.Prune = None,
    first_token: options.FirstToken = "compressed",
    source_layers: options.SourceLayers = "auto",
    window: options.Window = "question",
    plan: options.Plan = None,
    tolerance: options.Tolerance = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch: Annotated[int, option(MODEL, "Samples prefilled together.")] = 4,
    out: Annotated[
        Path | None, option(OUTPUT, "Folder for the table and each sample's record.")
    ] = None,
    resume: Annotated[bool, option(OUTPUT, "Go on in --out's folder.", "--resume")] = False,
    num_actors: Annotated[
        int | None,
        option(PROCESSES, "Spread over so many, by Ray (purekv[batch]). Default: this one alone."),
    ] = None,
    num_gpus_per_actor: options.GpusPerActor = None,
    address: options.Address = None,
    plots: Annotated[
        bool,
        option(
            OUTPUT,
            "Draw the table into --out's folder, with a page that shows the pictures.",
            "--plots",
        ),
    ] = False,
    speed_samples: Annotated[
        int, option(OUTPUT, "Samples on which each method is timed by itself; 0: none.")
    ] = 3,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Accuracy that methods keep at each budget, against the same model's full cache.

    purekv reference data DIR --n 200

    purekv eval --data DIR --methods clie,snapkv,h2o --budgets 1.0,0.2,0.1 --out RESULTS
    """
    from purekv import PureKVConfig, PureKVError
    from purekv.actors import Pool, require_ray
    from purekv.cli import tables
    from purekv.cli.quiet import quiet
    from purekv.evals import evaluate as ask
    from purekv.evals import make_methods, summarise
    from purekv.evals.frames import FewerFrames
    from purekv.evals.plots import require_matplotlib, write_plots
    from purekv.evals.speed import measure_speed
    from purekv.evals.spread import AskJob, evaluate_on
    from purekv.evals.suite import Record, check_ids
    from purekv.evals.text_metrics import require_text_metrics
    from purekv.loading import find_device, fingerprint, processor_fingerprint
    from purekv.memory import release
    from purekv.store import Store

    if not debug:
        quiet()
    if limit is not None:
        check_positive("limit", limit)
    check_positive("batch", batch)
    if resume and out is None:
        raise PureKVError("--resume goes on in a folder; name it with --out")
    if plots:
        if out is None:
            raise PureKVError("--plots draws into a folder; name it with --out")
        require_matplotlib()
    configs = make_methods(
        split_words(methods),
        [parse_budget(word) for word in split_words(budgets)],
        prefills=split_words(prefill),
        evicts=split_words(evict),
        first_token=first_token,
        source_layers=parse_source_layers(source_layers),
        window=parse_window(window),
        spatiotemporal=parse_spatiotemporal(spatiotemporal),
        plan=plan,
        prune=prune,
        tolerance=tolerance,
    )
    actors = None
    if num_actors is not None:
        actors, device = find_actors(num_actors, address, num_gpus_per_actor, device)
        require_ray()
    elif address is not None or num_gpus_per_actor is not None:
        raise PureKVError("--address and --num-gpus-per-actor are for actors; give --num-actors")
    find_device(device)
    data = (data / "data.jsonl" if data.is_dir() else data).absolute()
    samples = _picked(data, limit, seed)
    check_ids(samples)
    if any(turn.references for sample in samples for turn in sample.turns):
        require_text_metrics()
    checkpoint = find_checkpoint(model)
    check_layers(checkpoint, [config for config in configs if isinstance(config, PureKVConfig)])
    processor = checkpoint.processor()
    configs = [
        config.for_processor(processor) if isinstance(config, FewerFrames) else config
        for config in configs
    ]

    def load() -> Any:
        with step("loading the model"):
            return checkpoint.model(device=device, dtype=dtype)

    loaded = load()
    environment = _environment(loaded)
    store = None
    settings = {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "limit": limit,
        "seed": seed,
        "model": fingerprint(loaded),
        "processor": processor_fingerprint(processor),
        "attention": loaded.config._attn_implementation,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "batch": batch,
        "methods": [config.to_dict() for config in configs],
        **_versions(),
    }
    if out is not None:
        store = Store(out, settings, resume, log="samples.jsonl", parse=Record.from_dict)
    records = dict(store.records) if store else {}
    with step("evaluating", counted=True) as progress, ExitStack() as processes:
        progress.advance(len(records), len(samples))
        if actors is None:
            answered = ask(
                loaded, processor, samples, configs, batch_size=batch, done=records.copy()
            )
        else:
            loaded = None  # its memory is for those who work
            release()
            pool = processes.enter_context(Pool(actors, debug))
            job = AskJob(from_anywhere(checkpoint.name), device, dtype, configs)
            answered = evaluate_on(pool, job, samples, batch_size=batch, done=records.copy())
        for batch_records in answered:
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
    sounds = Counter(record.sound for record in records.values())
    if unheard := sounds["unheard"]:
        typer.echo(
            f"this model does not hear: the sound of {unheard} of {len(samples)} samples was left "
            "out, and questions about it cannot be answered",
            err=True,
        )
    rows = summarise(samples, records, configs, seed)
    result: dict[str, Any] = {
        "config": settings,
        "skipped": [{"id": name, "reason": reason} for name, reason in skipped],
        "sound": {"heard": sounds["heard"], "unheard": sounds["unheard"]},
        "rows": rows,
    }
    if store is not None:
        store.sort(sample.id for sample in samples)
        store.write("results.json", result)
    asked = [sample for sample in samples if not records[sample.id].skipped]
    if speed_samples > 0:
        loaded = loaded or load()
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
        typer.echo(json.dumps(environment | result | {"rows": rows}))
    else:
        tables.show_evaluation(rows)


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

    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        **_versions(),
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import purekv

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "purekv": purekv.__version__,
    }
