"""In place of `purekv.actors.Pool`: the work is done here, the last item first."""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any


class OneProcess:
    def __init__(self, actors: Any, debug: bool = False) -> None:
        pass

    def __enter__(self) -> "OneProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, job: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if items:
            work = pickle.loads(pickle.dumps(job))()
        for number in reversed(range(len(items))):
            yield (
                number,
                pickle.loads(pickle.dumps(work(pickle.loads(pickle.dumps(items[number]))))),
            )
