"""purekv: KV-cache compression for vision-language models.

with PureKV(PureKVConfig(budget=0.2))(model) as run:
    output = model.generate(**inputs, max_new_tokens=64)
print(run.report)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purekv.attach import PureKV, Run
    from purekv.config import PureKVConfig, SpatioTemporalConfig
    from purekv.errors import PureKVError
    from purekv.report import Report

try:
    __version__ = version("purekv")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "PureKV",
    "PureKVConfig",
    "PureKVError",
    "Report",
    "Run",
    "SpatioTemporalConfig",
    "__version__",
]

# Loaded at first use, so that the command line answers --help without importing torch.
_HOME = {
    "PureKV": "attach",
    "Run": "attach",
    "PureKVConfig": "config",
    "SpatioTemporalConfig": "config",
    "PureKVError": "errors",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'purekv' has no attribute {name!r}")
    return getattr(import_module(f"purekv.{_HOME[name]}"), name)
