"""Mixed data sets in batches: the same rights as one sample at a time, and honest tables."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import (
    Media,
    Sample,
    Turn,
    answer_samples,
    evaluate,
    prepare_samples,
    summarise,
)
from purekv.media import Clip
from tests.core.prompts import pixels
from tests.tiny import tiny_model, tiny_processor

CONFIGS = [
    PureKVConfig(budget=budget, scorer=scorer, first_token="compressed")
    for scorer in ("clie", "streaming", "key_diff")
    for budget in (0.5, 0.25)
]
# Videos (frames, height, width), images (height, width) and turns of each sample.
KINDS = [
    ([(4, 32, 48)], [], 2),
    ([], [(48, 32)], 1),
    ([(4, 32, 48)], [], 2),
    ([(4, 32, 32), (6, 32, 32)], [], 3),
    ([(4, 32, 48)], [(32, 32), (48, 48)], 2),
    ([(4, 32, 48)], [], 2),
    ([(4, 32, 48)], [], 1),
    ([], [(32, 48), (32, 48)], 2),  # as many pixels as that video: one batch with it
    ([(4, 32, 48)], [], 2),
]
CHOICES = ("red", "green")


def turns(number: int, count: int) -> tuple[Turn, ...]:
    asked = [
        Turn("what? " + "really? " * number, "a cat", "open"),
        Turn("and which one?", "B", "closed", CHOICES),
        Turn("why?", "no", "open"),
    ]
    return tuple(asked[:count])


@pytest.fixture
def samples():
    return [
        Sample(
            str(number),
            tuple(Path(f"{number}/{i}.mp4") for i in range(len(videos))),
            tuple(Path(f"{number}/{i}.png") for i in range(len(images))),
            turns(number, count),
        )
        for number, (videos, images, count) in enumerate(KINDS)
    ]


def from_memory(sample: Sample) -> Media:
    seed = int(sample.id)
    videos, images, _ = KINDS[seed]
    return Media(
        tuple(Clip(pixels(seed, *size), 2.0) for size in videos),
        tuple(Image.fromarray(pixels(seed, 1, *size)[0]) for size in images),
    )


def test_batches_of_many_kinds_are_right_where_each_sample_alone_is(samples, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    # Random weights are never right, so let the answers themselves be what is compared.
    monkeypatch.setattr(Turn, "accepts", lambda turn, prediction: prediction)
    reports = []
    found = evaluate(
        model, processor, samples, CONFIGS, batch_size=2, read=from_memory,
        progress=lambda found: reports.append(len(found.full)),
    )  # fmt: skip
    assert reports == [2, 4, 5, 6, 7, 8, 9]
    assert found.visual_tokens["1"] == 3 * 2
    for sample in samples:
        batch = prepare_samples(model, processor, [sample], [from_memory(sample)])
        assert found.full[sample.id] == answer_samples(model, processor, batch)[0]
        for config, ours in zip(CONFIGS, found.ours, strict=True):
            with PureKV(config)(model):
                assert ours[sample.id] == answer_samples(model, processor, batch)[0]


def test_it_stops_in_time_and_says_how_many_are_done(samples):
    model, processor = tiny_model(), tiny_processor()
    found = evaluate(
        model, processor, samples, CONFIGS[:1], batch_size=2, read=from_memory, seconds=0.0
    )
    row = summarise(samples, found.ours[0], found.full, CONFIGS[0])
    assert (len(found.full), row["n"]) == (2, 4)


def test_equal_ids_are_refused(samples):
    with pytest.raises(PureKVError, match="same id"):
        evaluate(tiny_model(), tiny_processor(), samples[:1] * 2, CONFIGS, read=from_memory)


def test_a_summary_counts_by_category_turn_and_media(samples):
    samples = samples[:7]
    full = {s.id: [True] * len(s.turns) for s in samples}
    ours = {s.id: [False] + [True] * (len(s.turns) - 1) for s in samples}
    row = summarise(samples, ours, full, CONFIGS[0])
    n = sum(len(s.turns) for s in samples)
    assert (row["scorer"], row["budget"], row["n"]) == ("clie", 0.5, n)
    assert row["accuracy"] == row["retention"] == pytest.approx((n - 7) / n)
    assert {k: (v["n"], v["accuracy"]) for k, v in row["by_turn"].items()} == {
        "1": (7, 0.0), "2": (5, 1.0), "3": (1, 1.0)
    }  # fmt: skip
    assert row["by_category"]["closed"]["accuracy"] == 1.0
    assert {k: v["n"] for k, v in row["by_media"].items()} == {
        "video": 7, "image": 1, "videos": 3, "mixed": 2
    }  # fmt: skip
    assert np.isclose(row["by_category"]["open"]["accuracy"], 1 / 8)
    assert summarise(samples, full, full, None)["scorer"] == "full"
