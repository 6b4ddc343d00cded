"""The families' matrix for VideoLLaMA2: what it shows x attention x batch x scorer x prefill."""

import pytest
import torch
from torch import Tensor

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig
from tests.videollama2.checkpoints import KINDS

LOGITS = {
    "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
SMALL = SpatioTemporalConfig(tile=1, anchor_frames=1, min_tokens=0)
SHOWS = {"image": [-200], "video": [-201], "mixed": [-200, 9, -201], "audio": [-202]}
ARGUMENTS = {-200: "pixel_values", -201: "pixel_values_videos", -202: "audio_values"}
NAMES = ("mistral", "mixtral", "qwen2", "av")


def prompt(name: str, shows: str, rows: tuple[int, ...]) -> dict[str, Tensor]:
    """A left-padded batch of these rows, whose texts differ in length."""
    side, generator = KINDS[name].image_size, torch.Generator().manual_seed(7)
    shapes = {-200: (3, 3, side, side), -201: (3, 6, 3, side, side), -202: (3, 100, 128)}
    before, behind = ([5], [5, 9, 11], [8]), ([17, 40], [17, 40, 41, 42], [90, 33, 71])
    texts = [[*before[row], *SHOWS[shows], *behind[row]] for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    made = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for token, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if token in SHOWS[shows]:
            made[ARGUMENTS[token]] = (15 + 6 * values if token == -202 else values)[list(rows)]
    return made


@pytest.mark.parametrize("prefill", ["dense", "spatiotemporal"])
@pytest.mark.parametrize("scorer", ["clie", "snapkv"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "shows"),
    [(name, shows) for name in NAMES for shows in SHOWS if shows != "audio" or KINDS[name].audio],
)
def test_matrix(model, name, shows, attention, scorer, prefill):
    """A row alone (batch 1) and in a padded batch of 3 answer the same; bytes fall."""
    ours = model(name)
    ours.set_attn_implementation(attention)
    config = PureKVConfig(budget=0.3, scorer=scorer, prefill=prefill, spatiotemporal=SMALL)
    with PureKV(config)(ours) as run:
        together = ours.generate(**prompt(name, shows, (0, 1, 2)), **LOGITS)
        report = run.report
        alone = [ours.generate(**prompt(name, shows, (row,)), **LOGITS) for row in range(3)]
    assert report.kv_bytes_kept < report.kv_bytes_full
    for visual, kept in zip(report.visual_tokens, report.kept_visual_tokens, strict=True):
        assert kept == int(0.3 * visual)
    if prefill != "dense" and -201 in SHOWS[shows]:
        assert "spatiotemporal" in report.prefill_per_layer
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)
