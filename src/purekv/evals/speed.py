"""Seconds of prefill and tokens a second, of the full cache and of each config on its own."""

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from purekv.attach import Run
from purekv.evals.answering import prepare_samples, read_media
from purekv.evals.frames import FewerFrames
from purekv.evals.methods import Method
from purekv.evals.samples import Sample
from purekv.timing import PhaseTimer

NEW_TOKENS = 16


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    configs: Sequence[Method],
) -> list[dict[str, float]]:
    """Medians over samples, one at a time, of runs that share nothing: `prefill_s` (the vision
    tower apart; scoring, eviction and the tail that runs again included) and `decode_tok_s`.

    The full cache comes first. Everything takes its turn on every sample, after a warm-up, so that
    a machine that gets slower is slower for all.
    """
    times: list[list[dict[str, float]]] = [[] for _ in range(1 + len(configs))]
    for round_, sample in enumerate([samples[0], *samples]):
        media = read_media(processor, sample)
        whole = prepare_samples(model, processor, [sample], [media]).inputs
        for number, config in enumerate([None, *configs]):
            inputs = whole
            attached: Any = nullcontext()
            if isinstance(config, FewerFrames):
                inputs = prepare_samples(model, processor, [sample], [config.thin(media)]).inputs
            elif config is not None:
                attached = Run(config, model)
            with attached, PhaseTimer(model) as timer:
                model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                )
                seconds = timer.seconds
            if round_:  # the first was the warm-up
                decode = (NEW_TOKENS - 1) / max(seconds["decode"], 1e-9)
                times[number].append({"prefill_s": seconds["prefill"], "decode_tok_s": decode})
    return [
        {key: median(one[key] for one in rows) for key in ("prefill_s", "decode_tok_s")}
        for rows in times
    ]
