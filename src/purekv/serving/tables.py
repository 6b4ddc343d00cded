"""Block tables and lengths without the hole, by tensor operations alone.

Nothing here looks at a value on the host, and shapes do not depend on values: what a CUDA graph
captured may be replayed with other requests in the same tensors.
"""

import torch
from torch import Tensor


def without_holes(
    table: Tensor, lengths: Tensor, first: Tensor, blocks: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """What attention is shown of rows behind their prompts.

    Args:
        table: [rows, n], the blocks of each row by position; whatever in places that it has none.
        lengths: [rows], logical ones.
        first: int [rows], the hole's first block.
        blocks: int [rows], how many it has; 0 in rows without a hole.
        entries: int [rows], by which the row is shorter.

    Returns:
        table and lengths of the entries that are stored, new tensors of the same shapes.
    """
    column = torch.arange(table.shape[1], device=table.device)
    from_column = column + blocks[:, None] * (column >= first[:, None])
    packed = table.gather(1, from_column.clamp_(max=table.shape[1] - 1))
    return packed, lengths - entries.to(lengths.dtype)
