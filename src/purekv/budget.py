"""How many visual tokens each row keeps. All rounding happens here."""

from purekv.errors import PureKVError
from purekv.layout import Layout


def visual_budget(budget: float | int, visual_tokens: int) -> int:
    """Visual entries kept per (layer, KV head) of a row with `visual_tokens` of them.

    A share is rounded down, so that the promised compression is reached, but never to zero.

    Raises:
        PureKVError: a count above the number of visual tokens.
    """
    if visual_tokens == 0:
        return 0
    if isinstance(budget, float):
        return max(1, int(budget * visual_tokens + 1e-6))
    if budget > visual_tokens:
        raise PureKVError(
            f"budget={budget} with {visual_tokens} visual tokens; a share is written 0.2, "
            "a count must not exceed the visual tokens"
        )
    return budget


def keep_counts(budget: float | int, layout: Layout) -> tuple[int, ...]:
    """Visual entries kept in each row."""
    return tuple(visual_budget(budget, count) for count in layout.visual_tokens)
