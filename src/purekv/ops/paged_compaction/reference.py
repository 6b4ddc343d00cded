"""What the kernel does, by a copy of all that is kept."""

import torch
from torch import Tensor


def paged_compaction(
    key_cache: Tensor, value_cache: Tensor, table: Tensor, kept: Tensor, tokens: int
) -> None:
    """Write a prompt's kept entries, in order, to where those of a compacted one are (see
    `purekv.serving.hole`): into its first blocks, and what fills no block into its last one.

    Args:
        key_cache, value_cache: [num_blocks, block_size, num_key_value_heads, D], changed in place;
            any strides, such as those of views into one tensor that holds both.
        table: int32 [n], the prompt's blocks in order.
        kept: int64 [num_key_value_heads, B], positions that stay, ascending; B = tokens modulo the
            block size.
        tokens: of the prompt.
    """
    block_size, count = key_cache.shape[1], kept.shape[1]
    place = torch.arange(count, device=kept.device)
    place += (tokens - count) * (place >= count // block_size * block_size)
    head = torch.arange(kept.shape[0], device=kept.device)[:, None]
    for cache in (key_cache, value_cache):
        entries = cache[table[kept // block_size], kept % block_size, head]
        cache[table[place // block_size], place % block_size, head] = entries
