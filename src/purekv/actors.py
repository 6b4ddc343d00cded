"""Work spread over processes by Ray Data. Everything that knows Ray is here.

with Pool(Actors(2)) as pool:
    for number, result in pool.map(job, items):
        ...

A *job* is a picklable object; calling it in a process loads what the work needs, a model say, and
returns the function that does it. Items travel one by one, when a process is free, so that whatever
they name, a video say, is read where it is needed and by no more processes than there are.
"""

import logging
import math
import os
import pickle
import re
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from typing import Any, TypeVar

import torch

from purekv.errors import PureKVError

TRIES = 3
"""How often an item is begun, if the process that works on it dies each time."""
HOPELESS = 3
"""Items lost before any was done, after which it is not the items that are at fault."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Job = Callable[[], Callable[[Item], Result]]


@dataclass(frozen=True)
class Lost:
    """In place of a result: every process that worked on the item died."""

    reason: str = (
        f"the process that worked on it died, {TRIES} times in a row: out of memory, or a file "
        "that makes a decoder crash"
    )


@dataclass(frozen=True)
class Actors:
    """How many processes, where, and what each of them takes."""

    count: int = 1
    address: str | None = None
    """Of a cluster: "host:port", or "auto" on one of its machines; None: this machine alone."""
    gpus: float = 0.0
    """Of each process; 0.5 lets two share one."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PureKVError(f"num_actors={self.count}; it must be at least 1")
        if self.address not in (None, "auto") and not re.fullmatch(r"[^:/]+:\d+", self.address):
            raise PureKVError(f"address={self.address!r}; write host:port, or auto")
        fits = math.isfinite(self.gpus) and self.gpus >= 0
        if not fits or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise PureKVError(
                f"num_gpus_per_actor={self.gpus:g}; write a whole number, or a share such as 0.5"
            )

    @property
    def cpus(self) -> int:
        """Threads of each process: its share of this one's; on a cluster one."""
        return 1 if self.address is not None else max(1, torch.get_num_threads() // self.count)


def require_ray() -> None:
    """Raises PureKVError if Ray Data is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise PureKVError("Ray Data is not installed; run pip install 'purekv[batch]'") from error


def check_reachable(address: str) -> None:
    """Raises PureKVError where nobody listens, for which Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise PureKVError(f"nothing answers at {address} ({error}); start Ray there") from error


class Pool:
    """Ray, started or joined with the first item, left with the block. Until then nothing can be
    written to stdout: Ray reports there.

    Args:
        debug: let Ray and the processes write to stderr.
    """

    def __init__(self, actors: Actors, debug: bool = False) -> None:
        self.actors, self.debug = actors, debug
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        # Where Ray reports the death of a process.
        self._stack.enter_context(redirect_stdout(sys.stderr if self.debug else StringIO()))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not self.debug:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        actors, ray = self.actors, _ray()
        settings: dict[str, Any] = {
            "log_to_driver": self.debug,
            "logging_level": logging.INFO if self.debug else logging.CRITICAL,
        }
        if actors.address is None:
            settings |= {
                "address": "local",
                "num_cpus": actors.cpus * actors.count + 1,  # of them one for Ray Data itself
                "include_dashboard": False,
                "object_store_memory": 2**27,  # paths and answers
            }
        else:
            check_reachable(actors.address)
            settings["address"] = actors.address
        try:
            ray.init(**settings)
        except Exception as error:  # Ray raises bare ones too
            what = "Ray does not start on this machine"
            if actors.address is not None:
                what = (
                    f"no Ray cluster at {actors.address} (has it a token? set RAY_AUTH_MODE=token)"
                )
            raise PureKVError(f"{what}: {_one_line(error)}") from error
        self._stack.callback(ray.shutdown)
        self._started = True
        if not self.debug:
            for name in ("ray", "ray.data"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        self._check_room()

    def _check_room(self) -> None:
        """Ray would wait for room that never comes."""
        actors, there = self.actors, _ray().cluster_resources()
        for name, each in (("CPU", actors.cpus), ("GPU", actors.gpus)):
            needed, found = each * actors.count, there.get(name, 0)
            if needed > found:
                raise PureKVError(
                    f"num_actors={actors.count} with {each:g} {name} each need {needed:g}, and "
                    f"there are {found:g}; lower --num-actors or --num-gpus-per-actor"
                )

    def map(self, job: Job[Item, Result], items: Sequence[Item]) -> Iterator[tuple[int, Any]]:
        """The number of each item and its result, or `Lost`, in the order in which they are done;
        every item once.

        An item whose process dies is begun again in a new one, up to `TRIES` times.

        Raises:
            PureKVError: Ray is not installed, there is no such cluster, or it has no room for the
                actors. The job cannot start, or its function raised: with that message. No process
                lives long enough to do anything.
        """
        if not items:
            return
        require_ray()
        if not self._started:
            self._start()
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = self.debug
        # A process that dies is started anew, and its items go to it again, for ever: that is Ray
        # Data's default. `_Tries` ends it.
        tries = ray.remote(_Tries).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        rows = [{"number": number, "item": pickle.dumps(one)} for number, one in enumerate(items)]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(job, tries.remote(), versions()),
            batch_size=None,  # a block, which is one item: what is done is known at once
            batch_format="pyarrow",
            # One in work, one waiting.
            compute=ray.data.ActorPoolStrategy(
                size=self.actors.count, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=self.actors.cpus,
            num_gpus=self.actors.gpus,
        )
        seen: set[int] = set()
        lost = 0
        try:
            for batch in results.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                columns = (batch[name].to_pylist() for name in ("number", "result"))
                for number, pickled in zip(*columns, strict=True):
                    result = _unpacked(pickled)
                    lost += isinstance(result, Lost)
                    if lost == HOPELESS == len(seen) + 1:
                        raise PureKVError(f"no item could be done; of the last, {result.reason}")
                    if number not in seen:
                        seen.add(number)
                        yield number, result
            assert len(seen) == len(items), f"{len(seen)} of {len(items)} results"
        except PureKVError:
            raise
        except Exception as error:  # from Ray, whose errors have no common class
            raise PureKVError(f"Ray gave up: {_one_line(error)}") from error


def versions() -> dict[str, str]:
    """What results depend on."""
    return {name: version(name) for name in ("purekv", "torch", "transformers")}


class _Tries:
    """In a process of its own: how often each item was begun."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.begun[number] += 1
        return self.begun[number]


class _Worker:
    """In a process of its own: starts the job with the first item, so that a failed start is
    reported like any other, and never raises, so that Ray retries nothing but deaths."""

    def __init__(self, job: Job[Any, Any], tries: Any, expected: dict[str, str]) -> None:
        self.job, self.tries, self.expected = job, tries, expected
        self.work: Callable[[Any], Any] | None = None

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        pairs = zip(*(batch[name].to_pylist() for name in ("number", "item")), strict=True)
        results = [pickle.dumps(self._do(number, pickle.loads(item))) for number, item in pairs]
        return pyarrow.table({"number": batch["number"], "result": results})

    def _do(self, number: int, item: Any) -> "_Done | _Failed":
        try:
            if _ray().get(self.tries.begin.remote(number)) > TRIES:
                return _Done(Lost())
            if self.work is None:
                self._check_versions()
                self.work = self.job()
            return _Done(self.work(item))
        except torch.AcceleratorError:
            traceback.print_exc()
            os._exit(1)  # its device is lost to this process, not to a new one
        except Exception as error:
            return _Failed(isinstance(error, PureKVError), _one_line(error), traceback.format_exc())

    def _check_versions(self) -> None:
        found = versions()
        for name, wanted in self.expected.items():
            if found[name] != wanted:
                raise PureKVError(
                    f"a process of the cluster has {name} {found[name]}, this one {wanted}; "
                    "install the same everywhere"
                )


@dataclass(frozen=True)
class _Done:
    result: Any


@dataclass(frozen=True)
class _Failed:
    """The work itself is at fault, not an item."""

    ours: bool
    message: str
    trace: str


def _unpacked(pickled: bytes) -> Any:
    done = pickle.loads(pickled)
    if isinstance(done, _Failed):
        message = done.message if done.ours else f"an actor failed: {done.message}"
        raise PureKVError(message) from RuntimeError(f"in the actor:\n{done.trace}")
    return done.result


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PureKVError) else f"{type(error).__name__}: {text}"[:500]


def _ray() -> Any:
    import ray

    return ray
