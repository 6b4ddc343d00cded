"""LLaVA-OneVision and LLaVA-NeXT-Video: images of any size, videos of pooled square frames."""

from collections.abc import Mapping
from typing import Any

from purekv.families.base import Family, Grid, Placeholder, encoded_lengths, token_runs


class LlavaFamily(Family):
    """An image's overview, tiles and line ends are one run, whose inner shape is left open; a video
    has frames of `frame_side` x `frame_side` tokens and may end with a token of its own."""

    newline = False
    """Whether a token ends each video."""
    limits = "images have no grid, so a sparse prefill attends to them densely"

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def frame_side(self, config: Any) -> int:
        raise NotImplementedError

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        ids = inputs["input_ids"]
        shown = token_runs(ids == config.image_token_id)
        images = [(1, 1, length) for *_, length in shown]
        side, end = self.frame_side(config), int(self.newline)
        lengths = encoded_lengths(inputs, "video")
        pixels = inputs.get("pixel_values_videos")
        if lengths is None and pixels is not None:
            lengths = [pixels.shape[1] * side**2 + end] * pixels.shape[0]
        frames: list[Grid] = []
        for length in lengths or []:
            frames += [((length - end) // side**2, side, side), *[(1, 1, 1)] * end]
        played = token_runs(ids == config.video_token_id)
        return [Placeholder("image", shown, images), Placeholder("video", played, frames)]
