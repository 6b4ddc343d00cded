"""The same in Triton, as flash-decoding: programs share the entries of a head and are merged after.

Letters: B rows, G KV heads, R query heads of a group (padded to ROWS), D and Dv head dimensions.
"""

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from purekv.ops.ragged_decode.reference import Segments

BLOCK_BYTES = 128  # entries at a time, times their item size
SHORTEST = 256  # entries that are worth a program
PROGRAMS = 4  # for each multiprocessor, if there are entries for as many


@triton.jit(do_not_specialize=["later"])
def _attend_part(  # type: ignore[no-untyped-def]
    query, flat_key, flat_value, start, length, later_key, later_value, later_mask, output, lse,
    scale, later, later_key_stride, later_value_stride, heads, parts,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, DIMS: tl.constexpr, DIMS_V: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One part of one head's flat entries, or, as the last part, its later ones."""
    head = tl.program_id(0).to(tl.int64)  # of B * G
    part = tl.program_id(1)
    is_later = part == parts
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    dim_v = tl.arange(0, DIMS_V)
    q = tl.load(
        query + (head * R + row)[:, None] * D + dim[None, :],
        mask=(row < R)[:, None] & (dim < D)[None, :], other=0.0,
    )  # fmt: skip

    total = tl.load(length + head).to(tl.int32)
    first = tl.load(start + head)
    share = tl.cdiv(tl.cdiv(total, parts), BLOCK) * BLOCK
    begin = part * share
    end = tl.minimum(begin + share, total)
    key = flat_key + first * D
    value = flat_value + first * DV
    if is_later:
        begin = begin * 0
        end = end * 0 + later
        key = later_key + head * later_key_stride
        value = later_value + head * later_value_stride

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total_weight = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS_V], tl.float32)
    for block in range(begin, end, BLOCK):
        entry = block + tl.arange(0, BLOCK)
        real = entry < end
        k = tl.load(
            key + entry[None, :] * D + dim[:, None],
            mask=real[None, :] & (dim < D)[:, None], other=0.0,
        )  # fmt: skip
        visible = real
        if MASKED:
            shown = tl.load(
                later_mask + (head // heads) * later + entry, mask=real & is_later, other=1
            )
            visible = real & (shown != 0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(visible[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        # Nothing visible so far: all weights are zero, and no -inf is subtracted from -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        rescale = tl.exp(largest - base)
        v = tl.load(
            value + entry[:, None] * DV + dim_v[None, :],
            mask=real[:, None] & (dim_v < DV)[None, :], other=0.0,
        )  # fmt: skip
        mixed = mixed * rescale[:, None]
        mixed += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total_weight = total_weight * rescale + tl.sum(weight, 1)
        largest = higher

    place = (head * (parts + 1) + part) * R + row
    safe = tl.where(total_weight > 0, total_weight, 1.0)
    tl.store(
        output + place[:, None] * DV + dim_v[None, :], mixed / safe[:, None],
        mask=(row < R)[:, None] & (dim_v < DV)[None, :],
    )  # fmt: skip
    tl.store(lse + place, largest + tl.log(total_weight), mask=row < R)


def ragged_decode(query: Tensor, segments: Segments, scale: float) -> Tensor:
    """As the reference, in the device's own precision. Waits for nothing."""
    s = segments
    batch, num_attention_heads, _, head_dim = query.shape
    heads = s.start.shape[1]
    groups, value_dim = num_attention_heads // heads, s.flat_value.shape[-1]
    parts = _parts(query.device, batch * heads, s.longest)
    partial = query.new_empty(batch * heads, parts + 1, groups, value_dim, dtype=torch.float32)
    lse = query.new_empty(batch * heads, parts + 1, groups, dtype=torch.float32)
    mask = s.later_mask
    unused = s.start  # some pointer, where there is no mask
    with torch.cuda.device_of(query):
        _attend_part[batch * heads, parts + 1](
            query.contiguous(), s.flat_key, s.flat_value, s.start.contiguous(),
            s.length.contiguous(), s.later_key, s.later_value,
            unused if mask is None else mask.contiguous(), partial, lse, scale,
            s.later_key.shape[2], s.later_key.stride(1), s.later_value.stride(1), heads, parts,
            R=groups, D=head_dim, DV=value_dim,
            ROWS=max(16, triton.next_power_of_2(groups)),
            DIMS=max(16, triton.next_power_of_2(head_dim)),
            DIMS_V=max(16, triton.next_power_of_2(value_dim)),
            BLOCK=BLOCK_BYTES // query.itemsize, MASKED=mask is not None,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    merged = (lse.softmax(1)[..., None] * partial).sum(1)
    return merged.view(batch, 1, num_attention_heads, value_dim).to(query.dtype)


def _parts(device: torch.device, heads: int, longest: int) -> int:
    """Programs that share the flat entries of a head."""
    wanted = triton.cdiv(PROGRAMS * _multiprocessors(device), heads)
    return max(1, min(wanted, triton.cdiv(longest, SHORTEST)))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
