"""The temporal pass: what a position sees of its own tile in earlier frames.

`triton_temporal.py` is the same in one kernel.
"""

from torch import Tensor

from purekv.attention.partial import Partial, attend


def add_earlier_frames(
    found: Partial, query: Tensor, key: Tensor, value: Tensor, scaling: float, tile: int
) -> None:
    """Add to `found`, in place, attention over the tile's positions in all earlier frames.

    Args:
        found: out [B, H, T, h, w, D] and lse [B, H, T, h, w] over other keys.
        query: [B, H, T, h, w, D].
        key, value: [B, Hkv, T, h, w, D].
        tile: side of a tile; those at the right and lower edges may be smaller.
    """
    if query.shape[2] < 2:
        return
    # Tiles of one region are equally large: the whole ones, then what is left at the edges.
    for rows, tile_height in regions(query.shape[3], tile):
        for columns, tile_width in regions(query.shape[4], tile):
            size = tile_height, tile_width
            region = ..., rows, columns, slice(None)
            part = _earlier_frames(query[region], key[region], value[region], scaling, *size)
            where = (slice(None), slice(None), slice(1, None), rows, columns)
            Partial(found.out[where], found.lse[where]).add(part)


def regions(length: int, tile: int) -> list[tuple[slice, int]]:
    whole = length - length % tile
    regions = [(slice(0, whole), tile), (slice(whole, length), length - whole)]
    return [(part, side) for part, side in regions if part.stop > part.start]


def _earlier_frames(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, tile_height: int, tile_width: int
) -> Partial:
    """Of frames 1.. over frames ..T-2, [B, H, T - 1, h, w, D]; all tiles are whole.

    The queries of a tile are so many more heads of its KV head; its keys, one place in the tile
    after the other, are then plain causal attention over frames.
    """
    batch, num_heads = query.shape[:2]

    def tiled(x: Tensor) -> Tensor:  # [B, heads, T - 1, Y, i, X, j, D]
        return x.unflatten(4, (-1, tile_width)).unflatten(3, (-1, tile_height))

    queries = tiled(query[:, :, 1:])
    across = queries.shape[3], queries.shape[5]
    queries = queries.permute(0, 3, 5, 1, 4, 6, 2, 7).flatten(3, 5).flatten(0, 2)
    keys, values = (
        tiled(x[:, :, :-1]).permute(4, 6, 0, 3, 5, 1, 2, 7).flatten(2, 4).flatten(0, 1)
        for x in (key, value)
    )  # [i * j, B * Y * X, Hkv, T - 1, D]
    found: Partial | None = None
    for place_key, place_value in zip(keys, values, strict=True):
        part = attend(queries, place_key, place_value, scaling, causal=True)
        if found is None:
            found = part.widened()
        else:
            found.add(part)
    assert found is not None

    def untiled(x: Tensor) -> Tensor:  # back from [B * Y * X, H * i * j, T - 1, ...]
        x = x.unflatten(1, (num_heads, tile_height, tile_width)).unflatten(0, (batch, *across))
        x = x.permute(0, 3, 6, 1, 4, 2, 5, *range(7, x.ndim))
        return x.flatten(5, 6).flatten(3, 4)

    return Partial(untiled(found.out), untiled(found.lse))
