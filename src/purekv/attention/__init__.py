"""Attention backends that purekv runs on, and the masks that it owns."""

from purekv.attention.backend import NAME_PREFIX, Backend

__all__ = ["NAME_PREFIX", "Backend"]
