"""How the budget is spread over layers and KV heads: one allocation a file, one line here.

Every allocation keeps as many entries in all as the uniform one; only where they are differs.
"""

from purekv.allocation.ada import Ada
from purekv.allocation.base import Allocation
from purekv.allocation.pyramid import Pyramid
from purekv.allocation.shares import LayerShares
from purekv.allocation.uniform import Uniform

ALLOCATIONS: dict[str, Allocation] = {"uniform": Uniform(), "pyramid": Pyramid(), "ada": Ada()}


def make_allocation(name: str, layer_shares: tuple[float, ...] | None = None) -> Allocation:
    """The allocation of that name, within layers of given shares if there are any."""
    allocation = ALLOCATIONS[name]
    return allocation if layer_shares is None else LayerShares(allocation, layer_shares)


__all__ = ["ALLOCATIONS", "Allocation", "LayerShares", "make_allocation"]
