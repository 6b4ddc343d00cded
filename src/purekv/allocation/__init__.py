"""How the budget is spread over layers and KV heads: one allocation a file, one line here.

Every allocation keeps as many entries in all as the uniform one; only where they are differs.
"""

from purekv.allocation.ada import Ada
from purekv.allocation.base import Allocation
from purekv.allocation.pyramid import Pyramid
from purekv.allocation.uniform import Uniform

ALLOCATIONS: dict[str, Allocation] = {"uniform": Uniform(), "pyramid": Pyramid(), "ada": Ada()}

__all__ = ["ALLOCATIONS", "Allocation"]
