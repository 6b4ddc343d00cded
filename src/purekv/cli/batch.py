"""`purekv batch`: a file of questions about videos and images, answered by several processes."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from purekv.cli import options
from purekv.cli.arguments import (
    parse_given_budget,
    parse_source_layers,
    parse_spatiotemporal,
    parse_window,
)
from purekv.cli.errors import explains_errors
from purekv.cli.inputs import check_layers, find_actors, find_checkpoint, from_anywhere
from purekv.cli.options import DATA, OUTPUT, PROCESSES, option
from purekv.cli.progress import step

SOME_FAILED = 3
"""Exit code of a run that reached its end, where not all samples could be answered: no other's."""


@explains_errors
def batch(
    data: Annotated[
        Path, option(DATA, "A data set's .jsonl, or the folder of one; no answers needed.")
    ],
    out: Annotated[Path, option(OUTPUT, "Folder for the answers.")],
    resume: Annotated[bool, option(OUTPUT, "Go on in --out's folder.", "--resume")] = False,
    num_actors: Annotated[int, option(PROCESSES, "Processes, each with the model.")] = 1,
    num_gpus_per_actor: options.GpusPerActor = None,
    address: options.Address = None,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    max_pixels: options.MaxPixels = None,
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
    model: options.Model = None,
    device: Annotated[str, option(options.MODEL, "auto, cpu or cuda.")] = "auto",
    dtype: options.Dtype = "auto",
    max_new_tokens: options.MaxNewTokens = 64,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer the questions of a whole file; exit code 3 if some could not be answered.

    purekv batch --data QUESTIONS.jsonl --out ANSWERS --num-actors 2

    A killed run goes on when its command is repeated with --resume.
    """
    import torch

    from purekv import PureKVConfig, PureKVError
    from purekv.actors import Lost, Pool, require_ray, versions
    from purekv.batch import AnswerJob, Answers
    from purekv.cli.quiet import quiet
    from purekv.evals import read_samples
    from purekv.loading import find_dtype, processor_fingerprint
    from purekv.store import Store

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
        plan=plan if plan is None else from_anywhere(plan),
        tolerance=tolerance,
    )
    actors, device = find_actors(num_actors, address, num_gpus_per_actor, device)
    find_dtype(dtype, torch.device(device))
    data = (data / "data.jsonl" if data.is_dir() else data).absolute()
    samples = read_samples(data, gold=False)
    if not samples:
        raise PureKVError(f"{data} has no samples; a line is one, see docs/evaluation.md")
    checkpoint = find_checkpoint(model)
    check_layers(checkpoint, [config])
    job = AnswerJob(
        from_anywhere(checkpoint.name),
        config,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        fps=fps,
        max_frames=max_frames,
        max_pixels=max_pixels,
    )
    settings = {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "model": checkpoint.fingerprint(),
        "processor": processor_fingerprint(checkpoint.processor()),
        "device": device,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "fps": fps,
        "max_frames": max_frames,
        "max_pixels": max_pixels,
        "config": config.to_dict(),
        "versions": versions(),
    }
    require_ray()

    store = Store(out, settings, resume, log="answers.jsonl", parse=Answers.from_dict)
    left = [sample for sample in samples if sample.id not in store.records]
    with step("answering", counted=True) as progress, Pool(actors, debug) as pool:
        progress.advance(len(store.records), len(samples))
        for number, found in pool.map(job, left):
            if isinstance(found, Lost):
                found = Answers(left[number].id, error=found.reason)
            store.add([found])
            progress.advance(len(store.records), len(samples))
    store.sort(sample.id for sample in samples)
    errors = [(one.id, one.error) for one in store.records.values() if one.error]
    result: dict[str, Any] = {
        "config": settings,
        "samples": len(samples),
        "answered": len(samples) - len(errors),
        "failed": len(errors),
        "errors": [{"id": name, "error": error} for name, error in errors],
    }
    store.write("results.json", result)
    for name, error in errors:
        typer.echo(f"failed sample {name}: {error}", err=True)
    if as_json:
        typer.echo(json.dumps({"answers": str(store.log), **result}))
    else:
        typer.echo(f"{store.log}: {result['answered']} answered, {len(errors)} failed")
    if errors:
        raise typer.Exit(SOME_FAILED)
