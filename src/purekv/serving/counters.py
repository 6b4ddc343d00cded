"""What a server says of its compactions on vLLM's `/metrics` page.

vLLM's own statistics have no place for counts of a plugin, and blocks are freed in another process
than the one that answers HTTP. prometheus_client's multi-process mode, which vLLM serves as well,
adds up counters of all processes that find PROMETHEUS_MULTIPROC_DIR in their environment.
"""

import os
import tempfile
from functools import cache
from typing import Any

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def share_counters() -> None:
    """Let the processes of a server that this one becomes or starts count together: name a fresh
    folder, unless the user named one. To be called before any of them imports prometheus_client."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="purekv-metrics-")


@cache
def counters() -> tuple[Any, Any]:
    """Prompts compacted and blocks freed, the counters of this process. They exist where blocks are
    freed only: a counter that stays at 0 in another process would be worse than none."""
    from prometheus_client import Counter

    return (
        Counter("purekv:prompts_compacted", "Prompts compacted, again after each preemption."),
        Counter("purekv:blocks_freed", "Blocks of KV cache freed behind compacted prompts."),
    )
