"""Spatial-temporal sparse attention: `purekv.attention.pattern`, executed without its mask.

Positions of a frame follow each other, and so do frames: each pass over a clip is causal or whole
attention on a view of what the layer has:

- spatial: a batch of frames, causal;
- context: all queries of the clip over the open positions before it;
- temporal: a batch of tiles, causal over frames (`temporal.py`, `triton_temporal.py`).

They see disjoint sets of keys and are added up by their log-sum-exps. Open positions are a causal
pass among themselves, and one over what they see before.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from purekv.attention import triton_temporal
from purekv.attention.partial import Partial, attend
from purekv.attention.pattern import Clip, Context, Interval, Pattern
from purekv.attention.temporal import add_earlier_frames


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, patterns: Sequence[Pattern]
) -> Tensor:
    """Attention of a whole prompt on itself. Not differentiable.

    Args:
        query: [B, num_attention_heads, S, D], rotated.
        key, value: [B, num_key_value_heads, S, D], key rotated.
        scaling: factor on the dot products.
        patterns: of each row; neighbouring rows with equal ones are computed together.

    Returns:
        [B, S, num_attention_heads, D], as transformers wants it; 0 at padding.
    """
    batch, num_heads, seq_len, head_dim = query.shape
    padded = any(pattern.tokens != (0, seq_len) for pattern in patterns)
    make = query.new_zeros if padded else query.new_empty
    out = make(batch, seq_len, num_heads, head_dim)
    start = 0
    for pattern, same in groupby(patterns):
        rows = slice(start, start := start + len(list(same)))
        _attend_rows(query[rows], key[rows], value[rows], scaling, pattern, out[rows])
    return out


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, pattern: Pattern, out: Tensor
) -> None:
    """Rows of one pattern; writes `out` [B, S, H, D] but for padding."""
    out = out.transpose(1, 2)
    # Clips first: the device is busy with them while the small passes over text are prepared.
    for clip, context in zip(pattern.clips, pattern.contexts, strict=True):
        _attend_clip(query, key, value, scaling, clip, context, out)
    for (start, stop), keys in pattern.open_runs:
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        found = attend(q, k, v, scaling, causal=True)
        if keys:
            found = found.widened()
            found.add(attend(q, _at(key, keys), _at(value, keys), scaling))
        out[:, :, start:stop] = found.out


def _attend_clip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    clip: Clip,
    context: Context,
    out: Tensor,
) -> None:
    """Writes `out` [B, H, S, D] at one clip."""
    q, k, v = (_frames(x, clip) for x in (query, key, value))
    open_key, open_value = (_at(x, context.positions) for x in (key, value))
    plane = clip.height, clip.width
    planes = q.unflatten(3, plane), k.unflatten(3, plane), v.unflatten(3, plane)
    found = _within_frames(q, k, v, scaling)
    together = len(clip.runs) == 1
    if triton_temporal.usable(query):
        result = _frames(out, clip) if together else torch.empty_like(q)
        triton_temporal.add_context_and_earlier_frames(
            found.unflatten(3, plane), *planes, open_key, open_value, context.seen, scaling,
            clip.tile, result.unflatten(3, plane),
        )  # fmt: skip
        if together:
            return
    else:
        found = found.widened()
        for first, last in clip.runs:
            seen = slice(context.seen[first])
            if seen.stop:
                queries = q[:, :, first:last].flatten(2, 3)
                part = attend(queries, open_key[:, :, seen], open_value[:, :, seen], scaling)
                frames = slice(None), slice(None), slice(first, last)
                mine = Partial(found.out[frames], found.lse[frames])
                mine.add(part.unflatten(2, (last - first, -1)))
        add_earlier_frames(found.unflatten(3, plane), *planes, scaling, clip.tile)
        result = found.out
    for first, last in clip.runs:
        start, stop = clip.positions((first, last))
        out[:, :, start:stop] = result[:, :, first:last].flatten(2, 3)


def _within_frames(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Partial:
    """Each frame on itself, causally: [B, H, T, h * w, D] like the query."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    found = attend(q, k, v, scaling, causal=True).unflatten(0, (len(query), -1))
    return Partial(found.out.transpose(1, 2), found.lse.transpose(1, 2))


def _frames(x: Tensor, clip: Clip) -> Tensor:
    """[B, H, T, h * w, D] from [B, H, S, D]: a view, unless there is text between the frames."""
    return _at(x, [clip.positions(run) for run in clip.runs]).unflatten(2, (len(clip.starts), -1))


def _at(x: Tensor, positions: Sequence[Interval]) -> Tensor:
    """These of x [B, H, S, D]: a view, if they follow each other."""
    parts = [x[:, :, start:stop] for start, stop in positions or [(0, 0)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
