"""Random requests: when they come, how long they are, who cancels, when all are preempted."""

import random
from dataclasses import dataclass
from typing import Any

from tests.vllm.prompts import random_prompts

ENGINE: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 128}
SMALL_POOL = 24
"""Blocks: one and a half of the longest requests."""


@dataclass
class Traffic:
    prompts: list[list[int]]
    new_tokens: list[int]
    arrivals: list[int]
    """Step of each request."""
    cancel: dict[str, int]
    """Step in which a request is cancelled, if it is not answered by then; most still wait."""
    cut: dict[str, int]
    """Tokens after which an answer is cancelled."""
    preempt: list[int]
    """Steps at which all running requests are preempted."""

    @classmethod
    def random(cls, count: int, seed: int = 0) -> "Traffic":
        """`count` requests, more than the pool can serve as they come."""
        rng = random.Random(seed)
        lengths = [rng.choice((20, 90, 200, 350)) + rng.randrange(32) for _ in range(count)]
        arrivals = [rng.randrange(7 * count) for _ in range(count)]
        cancelled = rng.sample(range(count), count // 10)
        new_tokens = [rng.choice((4, 40, 120)) for _ in range(count)]
        waiting, answering = cancelled[::2], cancelled[1::2]
        return cls(
            random_prompts(lengths),
            new_tokens,
            arrivals,
            {str(one): arrivals[one] + rng.randrange(60) for one in waiting},
            {str(one): rng.randrange(1, new_tokens[one]) for one in answering},
            sorted(rng.sample(range(10 * count), count // 5)),
        )

    def requests(self, asynchronous: bool) -> dict[str, Any]:
        return {
            "arrivals": self.arrivals,
            "cancel": self.cancel,
            "cut": self.cut,
            "preempt": self.preempt,
            "asynchronous": asynchronous,
        }

    def mismatches(self, answers: list[Any], alone: list[Any]) -> list[int]:
        """Requests answered otherwise than `alone`, or not answered though nobody cancelled."""
        return [
            one
            for one, (answer, expected) in enumerate(zip(answers, alone, strict=True))
            if answer != expected and (answer is not None or str(one) not in self.cancel | self.cut)
        ]
