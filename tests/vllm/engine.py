"""One vLLM engine in a process of its own: settings and prompts in, answers and figures out.

    python engine.py SETTINGS.json RESULT.json

Requests arrive all at once, or as "arrivals" (the step of each) says. "cancel" maps requests to the
step in which they are aborted, "cut" to the number of answered tokens at which they are; "images"
and "videos" map them to files of their media. At each step of "preempt" all that run are preempted,
besides those for whom the pool gets too small.
"""

import json
import os
import sys
import time


def read_video(name):
    """Its frames, two a second, and what vLLM wants to know of them."""
    import numpy as np

    frames = np.load(name)
    count = len(frames)
    known = {"total_num_frames": count, "frames_indices": list(range(count)), "fps": 2.0}
    return frames, known | {"duration": count / 2, "do_sample_frames": False}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be looked at
    from PIL import Image
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    with open(sys.argv[1]) as file:
        asked = json.load(file)
    config = EngineArgs(**asked["engine"]).create_engine_config()
    config.scheduler_config.async_scheduling = asked["asynchronous"]  # the CPU platform resets it
    engine = LLMEngine.from_vllm_config(config)
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free_at_start = pool.get_num_free_blocks()
    prompts, news = asked["prompts"], asked["new_tokens"]
    arrivals = asked.get("arrivals") or [0] * len(prompts)
    cancel = {int(name): step for name, step in (asked.get("cancel") or {}).items()}
    cut = {int(name): tokens for name, tokens in (asked.get("cut") or {}).items()}
    preempt = set(asked.get("preempt") or ())
    readers = {"image": Image.open, "video": read_video}
    media = {kind: asked.get(f"{kind}s") or {} for kind in readers}
    answers: dict[int, list[int]] = {}
    seen: dict[int, list[int]] = {}
    """Prompts as the model sees them, a token for each part of an image."""
    preemptions: dict[str, int] = {}
    step = peak = forced = cut_answers = 0
    began = time.perf_counter()
    waiting = list(range(len(prompts)))
    while waiting or engine.has_unfinished_requests():
        for one in [one for one in waiting if arrivals[one] <= step]:
            waiting.remove(one)
            sampling = SamplingParams(
                temperature=0, max_tokens=news[one], ignore_eos=True, detokenize=False
            )
            prompt = {"prompt_token_ids": prompts[one]}
            for kind, read in readers.items():
                if names := media[kind].get(str(one)):
                    shown = prompt.setdefault("multi_modal_data", {})
                    shown[kind] = [read(name) for name in names]
            engine.add_request(str(one), prompt, sampling)
        for one, when in cancel.items():
            if when == step:
                engine.abort_request([str(one)])
        if step in preempt:
            forced += len(scheduler.running)
            engine.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step() if engine.has_unfinished_requests() else ():
            one, tokens = int(output.request_id), list(output.outputs[0].token_ids)
            if output.finished:
                answers[one], seen[one] = tokens, list(output.prompt_token_ids)
            elif one in cut and len(tokens) >= cut[one]:
                engine.abort_request([str(one)])
                cut_answers += 1
        step += 1
        peak = max(peak, len(scheduler.running))
        for name, request in scheduler.requests.items():
            if request.num_preemptions:
                preemptions[name] = request.num_preemptions
    if engine.has_unfinished_requests() or waiting:
        raise RuntimeError("requests are left")
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    result = {
        "answers": [answers.get(one) for one in range(len(prompts))],
        "prompts": [seen.get(one) for one in range(len(prompts))],
        "steps": step,
        "peak": peak,
        "seconds": time.perf_counter() - began,
        "blocks": free_at_start,
        "preempted_requests": len(preemptions),
        "preemptions": sum(preemptions.values()),
        "forced_preemptions": forced,
        "cut_answers": cut_answers,
        "compactions": getattr(manager, "compactions", 0),
        "freed_blocks": getattr(manager, "freed_blocks", 0),
        "blocks_lost": free_at_start - pool.get_num_free_blocks(),
        "left_in_manager": len(manager.req_to_blocks),
        "scheduler": type(scheduler).__name__,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)
