"""purekv: KV-cache compression for vision-language models.

with PureKV(PureKVConfig(budget=0.2))(model) as run:
    output = model.generate(**inputs, max_new_tokens=64)
print(run.report)
"""

from importlib.metadata import PackageNotFoundError, version

from purekv.attach import PureKV, Run
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.report import Report

try:
    __version__ = version("purekv")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["PureKV", "PureKVConfig", "PureKVError", "Report", "Run", "__version__"]
