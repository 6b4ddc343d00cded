"""A job that one of its items kills, and one that another disturbs once; prints what came of each
item."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Job:
    log: str
    """One mark each time the item is begun."""
    poison: int

    def __call__(self) -> Callable[[int], int]:
        def square(item: int) -> int:
            if item == self.poison:
                with open(self.log, "a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            if item == self.poison + 1 and not os.path.exists(f"{self.log}.failed"):
                Path(f"{self.log}.failed").touch()
                raise torch.AcceleratorError("the device has failed")
            time.sleep(0.02)
            return item * item

        return square


if __name__ == "__main__":
    import sys

    from purekv.actors import Actors, Lost, Pool
    from tests.ray.poison import Job as ImportedJob

    with Pool(Actors(2)) as pool:
        found = list(pool.map(ImportedJob(sys.argv[1], 7), range(20)))
    print(json.dumps([[n, "lost" if isinstance(one, Lost) else one] for n, one in sorted(found)]))
