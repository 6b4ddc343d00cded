"""Placeholder ids and what they become: a run of the same id for every feature row of an item."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purekv.errors import PureKVError
from purekv.families.videollama2.config import audio_grid, video_grid

IMAGE, VIDEO, AUDIO = -200, -201, -202
"""In `input_ids`; never in a vocabulary."""

TAGS = {"<image>": IMAGE, "<video>": VIDEO, "<audio>": AUDIO}
"""In prompts."""

MEDIA = {"pixel_values": IMAGE, "pixel_values_videos": VIDEO, "audio_values": AUDIO}
"""Which argument of a forward fills which placeholder."""


def expand(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    media: Mapping[str, Tensor],
    padding_side: str = "right",
) -> tuple[Tensor, Tensor | None]:
    """Give each placeholder as many positions as its item has feature rows.

    A placeholder stands alone (upstream's way) or is a run already (what this function answers).
    Audio without a placeholder of its own follows its video's rows. A row of padding stays where
    it is: upstream puts ones in front of the mask instead, which is the same only without padding.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S] or None.
        media: arguments of the forward, by name: `pixel_values` [n, 3, H, W],
            `pixel_values_videos` [n, frames, 3, H, W], `audio_values` [n, rows, mel bins].
        padding_side: where rows that become shorter than others are filled up.

    Raises:
        PureKVError: placeholders and media do not fit.
    """
    runs = _runs(config, input_ids, media)
    if not runs:
        return input_ids, attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [
        [(new, kept) for token, kept in zip(*row, strict=True) for new in runs.get(token, (token,))]
        for row in zip(input_ids.tolist(), mask.tolist(), strict=True)
    ]
    width = max(map(len, rows))
    if padding_side == "right":
        rows = [row + [(0, 0)] * (width - len(row)) for row in rows]
    else:
        rows = [[(0, 0)] * (width - len(row)) + row for row in rows]
    ids, mask = torch.tensor(rows, device=input_ids.device).unbind(-1)
    return ids, mask if attention_mask is not None or not mask.all() else None


def _runs(config: Any, input_ids: Tensor, media: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """What single placeholders become."""
    items = {MEDIA[name]: len(values) for name, values in media.items()}
    rows = {MEDIA[name]: _feature_rows(config, name, values) for name, values in media.items()}
    found = {token: int((input_ids == token).sum()) for token in MEDIA.values()}
    runs = {}
    beside = AUDIO in items and not found[AUDIO]
    if beside and items[AUDIO] != items.get(VIDEO, 0):
        raise PureKVError(
            f"{items[AUDIO]} audio tracks have no <audio> ({AUDIO}) in the prompt and go with "
            f"videos, of which there are {items.get(VIDEO, 0)}; give one for each video"
        )
    for token in MEDIA.values():
        count = items.get(token, 0)
        if token == AUDIO and beside:
            continue
        if found[token] == count:
            runs[token] = [token] * rows.get(token, 0)
        elif found[token] != count * rows.get(token, 0):
            raise PureKVError(
                f"the prompt has {found[token]} placeholders {token}, and there are {count} items "
                f"of {rows.get(token, 0)} tokens for them; give one placeholder for each item"
            )
    if beside:
        runs[VIDEO] = runs.get(VIDEO, [VIDEO]) + [AUDIO] * rows[AUDIO]
    return {token: run for token, run in runs.items() if items.get(token)}


def _feature_rows(config: Any, name: str, values: Tensor) -> int:
    if name == "audio_values":
        grid = audio_grid(config, values.shape[1])
    else:
        frames = values.shape[1] if name == "pixel_values_videos" else config.num_frames
        grid = video_grid(config, frames)
    return grid[0] * grid[1] * grid[2]
