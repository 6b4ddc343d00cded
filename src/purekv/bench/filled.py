"""Caches as a prefill would leave them, filled with random entries: no prompt has to run.

What decoding costs depends on how many entries there are and where they lie, not on what they say.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from purekv import families
from purekv.cache import EvictingLayer, make_evicting
from purekv.ragged import RaggedLayer
from purekv.selection import RaggedSelection, Selection

UNEVEN = 0.5
"""A head of an uneven cache has up to so many more, or fewer, entries than the mean, as a share."""


def dynamic_cache(model: PreTrainedModel, batch: int, tokens: int) -> Cache:
    """Transformers' own, which concatenates at every step."""
    cache = DynamicCache()
    for layer_idx, entries in enumerate(_entries(model, batch, tokens)):
        cache.update(*entries, layer_idx)
    return cache


def growing_cache(model: PreTrainedModel, batch: int, tokens: int) -> Cache:
    """Full, with room for new tokens behind it: the best that a dense cache can do."""
    cache = DynamicCache()
    make_evicting(cache, model.config.get_text_config().num_hidden_layers)
    for layer, entries in zip(cache.layers, _entries(model, batch, tokens), strict=True):
        layer.update(*entries)
    return cache


def compressed_cache(
    model: PreTrainedModel, batch: int, tokens: int, kept: int, uneven: bool = False
) -> Cache:
    """What eviction leaves of `tokens` entries: `kept` in each head, or on average over heads."""
    cache = DynamicCache()
    layer_class = RaggedLayer if uneven else EvictingLayer
    make_evicting(cache, model.config.get_text_config().num_hidden_layers, layer_class)
    for layer, (key, value) in zip(cache.layers, _entries(model, batch, tokens), strict=True):
        shape, device = key.shape[:2], key.device
        choose = _uneven_selection if uneven else _even_selection
        layer.lazy_initialization(key, value)
        layer.evict(key, value, choose(shape, tokens, kept, device), tokens)
        layer.prompt_entries = layer.physical_length
    return cache


def _entries(model: PreTrainedModel, batch: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, num_key_value_heads, tokens, D]; one layer at a time."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape = batch, text.num_key_value_heads, tokens, head_dim
    for layer in families.for_config(model.config).language_model(model).layers:
        weight = next(layer.parameters())
        yield (
            torch.randn(shape, device=weight.device, dtype=weight.dtype),
            torch.randn(shape, device=weight.device, dtype=weight.dtype),
        )


def _even_selection(
    shape: tuple[int, int], tokens: int, kept: int, device: torch.device
) -> Selection:
    """Evenly over the prompt: which ones matters to no kernel."""
    index = torch.arange(kept, device=device) * tokens // kept
    return Selection(index.expand(*shape, -1).contiguous(), None)


def _uneven_selection(
    shape: tuple[int, int], tokens: int, kept: int, device: torch.device
) -> RaggedSelection:
    """Heads from few to many entries, the same total in every row."""
    batch, heads = shape
    more = torch.linspace(-UNEVEN, UNEVEN, heads) if heads > 1 else torch.zeros(1)
    length = ((1 + more) * kept).round().clamp(1, tokens).long()
    entry = torch.arange(tokens)
    stays = (entry < length[:, None]).expand(batch, -1, -1)
    index = stays.flatten().nonzero().flatten().to(device)
    return RaggedSelection(index, length.expand(batch, -1).contiguous().to(device), kept)
