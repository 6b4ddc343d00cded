"""Which layers of the decoder do what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRoles:
    num_layers: int
    evicting: tuple[int, ...]
    """See everything, and forget; all others see a sliding window and keep the model's cache."""
    dropping: tuple[int, ...] = ()
    """Behind which tokens are dropped, down to the budget behind the last one."""
    active: frozenset[int] = frozenset()
    """Evict before they attend."""
