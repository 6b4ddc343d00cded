"""The vision tower's attention: chunks of one length in one call, not one call for each chunk.

Qwen's towers attend inside windows and frames. Under SDPA transformers loops over them in Python:
256 frames of 32 x 32 patches are 4,096 windows, which 28 of 32 layers go through one by one. Under
FlashAttention it hands over all tokens and `cu_seqlens`; so an implementation whose name says
"flash" is given those, and batches what is alike.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Chunks:
    """Chunks of a sequence, those of one length next to each other."""

    groups: tuple[tuple[int, int], ...]
    """(chunks, length) of each group."""
    order: Tensor | None
    """int64 [S]; the positions, group after group. None: as they are."""
    inverse: Tensor | None
    """int64 [S]; where each position went."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, sort: bool) -> "Chunks":
        """From int [chunks + 1], where each chunk begins and the last one ends. Waits for it.

        `sort` brings chunks of one length together, wherever they are; else only neighbours are.
        """
        lengths = cu_seqlens.diff()
        each = lengths.tolist()
        runs = tuple((len(list(run)), length) for length, run in groupby(each))
        count = Counter(each)
        if not sort or len(runs) == len(count):
            return cls(runs, None, None)
        length_at = lengths.repeat_interleave(lengths, output_size=sum(each))  # [S]
        order = length_at.argsort(stable=True)
        groups = tuple((count[length], length) for length in sorted(count))
        return cls(groups, order, order.argsort())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention inside each chunk: [1, H, S, D] each, to [1, S, H, D]."""
        if self.order is not None:
            query, key, value = (x.index_select(2, self.order) for x in (query, key, value))
        outputs, begin = [], 0
        for count, length in self.groups:
            # [1, H, count * length, D] to [count, H, length, D], a view.
            q, k, v = (
                x.narrow(2, begin, count * length).unflatten(2, (count, length))[0].transpose(0, 1)
                for x in (query, key, value)
            )
            output = F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            begin += count * length
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.inverse is not None:
            output = output.index_select(0, self.inverse)
        return output[None]


class BatchedChunks:
    """Give a vision tower that runs under SDPA this attention, inside the block.

    Towers under other implementations are left alone: FlashAttention needs no help, and who asks
    for eager attention gets it.
    """

    def __init__(self, tower: nn.Module) -> None:
        self._config: Any = tower.config
        self._name = f"purekv_flash_vision_{id(self):x}"  # transformers looks for "flash"
        self._chunks = WeakIdKeyDictionary()
        """Of each `cu_seqlens` under way: all layers of a forward share one or two."""
        self._attached = False

    def __enter__(self) -> Self:
        self._attached = self._config._attn_implementation == "sdpa"
        if self._attached:
            ALL_ATTENTION_FUNCTIONS[self._name] = self._attend
            self._config._attn_implementation = self._name
        return self

    def __exit__(self, *exc: object) -> None:
        if self._attached:
            self._config._attn_implementation = "sdpa"
            del ALL_ATTENTION_FUNCTIONS[self._name]
            self._attached = False

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        cu_seq_lens_q: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The registered attention function: [B, H, S, D] each, to [B, S, H, D]; B is 1 in a tower
        of chunks."""
        if cu_seq_lens_q is None:  # a tower that splits by itself, or has a batch of frames
            output = F.scaled_dot_product_attention(
                query, key, value, scale=scaling, dropout_p=dropout
            )
            return output.transpose(1, 2), None
        if cu_seq_lens_q not in self._chunks:
            # A CPU takes longer to move tokens than to make the calls that this saves.
            self._chunks[cu_seq_lens_q] = Chunks.of(cu_seq_lens_q, sort=query.is_cuda)
        return self._chunks[cu_seq_lens_q].attend(query, key, value, scaling, dropout), None
