"""The kernel of `triton_temporal.py`. Importing this needs Triton."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# What a program needs in registers and shared memory varies; that of the last fits small GPUs.
CONFIGS = [
    triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 2),
    )
]


@triton.jit
def _add_keys(
    acc, m, total, q, k_rows, v_rows, exists, visible, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys: the usual online softmax, in powers of two. If masked, some of them do not
    exist or are not visible to all queries."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    if MASKED or HEAD_DIM != BLOCK_D:
        here = exists[:, None] & (dims < HEAD_DIM)
        k = tl.load(k_rows[:, None] + dims, mask=here, other=0.0)
        v = tl.load(v_rows[:, None] + dims, mask=here, other=0.0)
    else:
        k = tl.load(k_rows[:, None] + dims)
        v = tl.load(v_rows[:, None] + dims)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        logits = tl.where(exists[None, :] & visible, logits, float("-inf"))
    new_m = tl.maximum(m, tl.max(logits, 1))
    shrink = tl.exp2(m - new_m)
    weights = tl.exp2(logits - new_m[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_m, total


@triton.jit
def _tile_rows(
    tile, strides, n, TILE_WIDTH: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """Addresses of a tile's keys of these numbers."""
    frame, down, along = n // PLACES, n % PLACES // TILE_WIDTH, n % TILE_WIDTH
    return tile + frame.to(tl.int64) * strides[2] + down * strides[3] + along * strides[4]


@triton.jit(do_not_specialize=["num_frames", "tiles_across", "num_kv_heads", "tile"])
def kernel(
    query, key, value, found_out, found_lse, out, open_key, open_value, open_seen,
    query_strides, key_strides, value_strides, found_strides, lse_strides, out_strides,
    open_key_strides, open_value_strides,
    num_frames, tiles_across, num_kv_heads, tile, scale_log2,
    GROUPS: tl.constexpr, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Strides are of [B, heads, T, h, w] and, of open positions, of [B, heads, n]; `tile` is the
    side of whole tiles, which those at the edges are not."""
    PLACES: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    ROWS: tl.constexpr = PLACES * GROUPS  # of one frame
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    top = tl.program_id(1) // tiles_across * TILE_HEIGHT  # of the tile, within a frame
    left = tl.program_id(1) % tiles_across * TILE_WIDTH
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_frames * ROWS
    frame = row // ROWS
    place = row % ROWS // GROUPS
    head = kv_head * GROUPS + row % GROUPS
    y = top + place // TILE_WIDTH
    x = left + place % TILE_WIDTH
    t = frame.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    here = exists[:, None] & (dims < HEAD_DIM)[None, :]

    s = query_strides
    q_rows = query + batch * s[0] + head * s[1] + t * s[2] + y * s[3] + x * s[4]
    q = tl.load(q_rows[:, None] + dims[None, :], mask=here, other=0.0)
    s = found_strides
    rows = found_out + batch * s[0] + head * s[1] + t * s[2] + y * s[3] + x * s[4]
    acc = tl.load(rows[:, None] + dims[None, :], mask=here, other=0.0).to(tl.float32)
    s = lse_strides
    rows = found_lse + batch * s[0] + head * s[1] + t * s[2] + y * s[3] + x * s[4]
    m = tl.load(rows, mask=exists, other=0.0).to(tl.float32) * LOG2_E
    total = tl.full([BLOCK_M], 1.0, tl.float32)

    number = tl.arange(0, BLOCK_N)
    # What the first of the block's frames sees is seen by all of its rows: no mask up to there.
    first = block * BLOCK_M // ROWS
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // ROWS, num_frames - 1)

    s = open_key_strides
    k_head = open_key + batch * s[0] + kv_head * s[1]
    s = open_value_strides
    v_head = open_value + batch * s[0] + kv_head * s[1]
    seen = tl.load(open_seen + frame, mask=exists, other=0)
    most = tl.load(open_seen + last)
    whole = tl.load(open_seen + first) // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        n = (start + number).to(tl.int64)
        k_rows, v_rows = k_head + n * open_key_strides[2], v_head + n * open_value_strides[2]
        acc, m, total = _add_keys(
            acc, m, total, q, k_rows, v_rows, n >= 0, True, scale_log2, HEAD_DIM, BLOCK_D, False
        )
    for start in range(whole, most, BLOCK_N):
        n = (start + number).to(tl.int64)
        k_rows, v_rows = k_head + n * open_key_strides[2], v_head + n * open_value_strides[2]
        acc, m, total = _add_keys(
            acc, m, total, q, k_rows, v_rows, n < most, n[None, :] < seen[:, None], scale_log2,
            HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    whole = first * PLACES // BLOCK_N * BLOCK_N
    s = key_strides
    k_tile = key + batch * s[0] + kv_head * s[1] + top * s[3] + left * s[4]
    s = value_strides
    v_tile = value + batch * s[0] + kv_head * s[1] + top * s[3] + left * s[4]
    for start in range(0, whole, BLOCK_N):
        n = start + number
        k_rows = _tile_rows(k_tile, key_strides, n, TILE_WIDTH, PLACES)
        v_rows = _tile_rows(v_tile, value_strides, n, TILE_WIDTH, PLACES)
        acc, m, total = _add_keys(
            acc, m, total, q, k_rows, v_rows, n >= 0, True, scale_log2, HEAD_DIM, BLOCK_D, False
        )
    for start in range(whole, last * PLACES, BLOCK_N):
        n = start + number
        k_rows = _tile_rows(k_tile, key_strides, n, TILE_WIDTH, PLACES)
        v_rows = _tile_rows(v_tile, value_strides, n, TILE_WIDTH, PLACES)
        earlier = (n // PLACES)[None, :] < frame[:, None]
        acc, m, total = _add_keys(
            acc, m, total, q, k_rows, v_rows, n < last * PLACES, earlier, scale_log2,
            HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    s = out_strides
    rows = out + batch * s[0] + head * s[1] + t * s[2] + y * s[3] + x * s[4]
    result = acc / total[:, None]
    tl.store(rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=here)


# Tried once for each side of a tile, and remembered on disk; at the edges it is not tried again.
SHAPE = ["GROUPS", "HEAD_DIM", "tile"]
tuned = triton.autotune(CONFIGS, key=SHAPE, cache_results=True)(kernel)
