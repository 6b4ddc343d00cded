"""Fewer frames and smaller images, at the visual tokens that a compressed cache keeps."""

import numpy as np
import pytest
from PIL import Image

from purekv.budget import visual_budget
from purekv.evals import Media
from purekv.evals.frames import FewerFrames
from purekv.media import Clip
from purekv.reference.model import make_processor
from tests.tiny import tiny_tokenizer

BUDGETS = [0.5, 0.3, 0.2, 0.1, 0.05]


@pytest.fixture(scope="module")
def processor():
    return make_processor(tiny_tokenizer())


def clip_grid(processor, clip):
    found = processor.video_processor(
        videos=[clip.frames], video_metadata=[clip.metadata], do_sample_frames=False
    )
    t, h, w = found["video_grid_thw"][0].tolist()
    return t, h // 2, w // 2


def image_grid(processor, image):
    t, h, w = processor.image_processor(images=[image])["image_grid_thw"][0].tolist()
    return t, h // 2, w // 2


def check(before, after, budget):
    allowed = visual_budget(budget, int(np.prod(before)))
    t, h, w = after
    if allowed / t >= 20:
        assert t * h * w <= allowed
        assert allowed - t * h * w < t * max(h, w)
    else:  # of fewer than 16, the processor makes 16 or a few more
        assert h * w <= 24
    proportions = (h / w) / (before[1] / before[2])
    assert 0.55 < proportions < 1.8


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "shape", [(20, 280, 280), (18, 224, 224), (14, 336, 336), (10, 280, 196), (7, 250, 300)]
)
def test_a_video_costs_the_share(processor, shape, budget):
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    clip = Clip(frames, 2.0)
    thin = FewerFrames(budget).thin(Media(videos=(clip,))).videos[0]
    assert len(thin.frames) % 2 == 0 or len(thin.frames) == len(frames)
    assert len(thin.frames) / thin.fps == pytest.approx(len(frames) / clip.fps)
    check(clip_grid(processor, clip), clip_grid(processor, thin), budget)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [(896, 896), (448, 448), (280, 700), (500, 333)])
def test_an_image_costs_the_share(processor, size, budget):
    image = Image.new("RGB", size)
    thin = FewerFrames(budget).thin(Media(images=(image,))).images[0]
    check(image_grid(processor, image), image_grid(processor, thin), budget)


def test_a_short_video_of_few_tokens_is_at_its_share(processor):
    clip = Clip(np.zeros((20, 280, 280, 3), np.uint8), 2.0)
    thin = FewerFrames(0.05).thin(Media(videos=(clip,))).videos[0]
    assert thin.frames.shape == (2, 196, 196, 3)  # 49 of 1000 tokens, 50 are allowed


def test_where_the_number_of_frames_is_enough_they_keep_their_size():
    clip = Clip(np.zeros((20, 281, 290, 3), np.uint8), 2.0)
    thin = FewerFrames(0.2).thin(Media(videos=(clip,))).videos[0]
    assert thin.frames.shape == (4, 281, 290, 3)


def test_the_grid_may_be_another():
    image = Image.new("RGB", (320, 320))
    assert FewerFrames(0.5, multiple_of=32).thin(Media(images=(image,))).images[0].size == (
        224,
        224,
    )
