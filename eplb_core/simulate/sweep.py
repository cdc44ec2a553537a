"""Replay a trace under many configurations, in this process or several."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core._checks import EplbError, check_count, check_kind
from eplb_core.costs import Costs
from eplb_core.simulate import check_trace, replay_trace
from eplb_core.simulate.configuration import Configuration
from eplb_core.simulate.replay import Replay

Progress = Callable[[int, int], Any]

_POLL_SECONDS = 0.1
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SimulationError(RuntimeError):
    """Work that failed, or a process that ended: the message says in which configuration."""


def sweep(
    load: Int[Any, "windows layers logical"],
    configurations: Sequence[Configuration],
    *,
    costs: Costs | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    keep_placements: bool = True,
) -> tuple[Replay, ...]:
    """Replay a trace under each configuration.

    Results are in the order of `configurations`, and do not depend on `jobs` (planning times aside). With several
    jobs, other processes do the work: call this from a module's `if __name__ == "__main__":` block.

    Args:
        load: `[windows, layers, logical]` tokens, at least two windows.
        configurations: what to run; see `grid`.
        costs: what serving and moving cost; `Costs()` by default.
        jobs: processes, >= 1; 1 works in this one.
        progress: called with the windows served so far and in all, from time to time and at the end.
        keep_placements: keep every placement of each replay, not the last alone.

    Returns:
        One `Replay` per configuration.

    Raises:
        EplbError: naming the configuration that cannot be run.
        SimulationError: if a process fails or ends; the others are stopped.

    >>> from eplb_core import Topology
    >>> load = np.asarray([[[2, 1, 8, 1]], [[1, 2, 8, 1]], [[1, 1, 9, 1]]])
    >>> replays = sweep(load, [Configuration(Topology(2, 3), policy=policy) for policy in ("static", "greedy")])
    >>> [round(replay.mean_balancedness, 3) for replay in replays]
    [0.616, 0.902]
    """
    load, costs = check_trace(load), Costs() if costs is None else costs
    check_kind(costs, Costs, "sweep(costs=...)")
    jobs = check_count(jobs, "sweep(jobs=...)", 1, advice="Use 1 to work in this process.")
    check_kind(progress, (Callable, type(None)), "sweep(progress=...)")
    check_kind(configurations, (list, tuple), "sweep(configurations=...)")
    for configuration in configurations:
        check_kind(configuration, Configuration, "sweep(configurations=...)")
    task = _Task(load, tuple(configurations), costs, keep_placements)
    jobs = min(jobs, len(task.configurations))
    return tuple(_sequential(task, progress) if jobs <= 1 else _parallel(task, jobs, progress))


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Task(NamedTuple):
    """What a sweep has to do; every process gets a copy."""

    load: np.ndarray
    configurations: tuple[Configuration, ...]
    costs: Costs
    keep_placements: bool

    @property
    def num_windows(self) -> int:
        """Windows to serve in all."""
        return len(self.load) * len(self.configurations)

    def run(self, index: int, served: Callable[[int], Any]) -> Replay:
        """Replay one configuration; `served` is called with 1 after each window."""
        replay = replay_trace(self.load, self.configurations[index], self.costs, served)
        return replay if self.keep_placements else replay._replace(placements=replay.placements[-1:])


def _sequential(task: _Task, progress: Progress | None) -> Iterator[Replay]:
    served = 0

    def count(windows: int) -> None:
        nonlocal served
        served += windows
        if progress:
            progress(served, task.num_windows)

    for index in range(len(task.configurations)):
        with _named(task, index):
            replay = task.run(index, count)
        yield replay


def _parallel(task: _Task, jobs: int, progress: Progress | None) -> list[Replay]:
    context = multiprocessing.get_context("spawn")
    # One counter per configuration, written by one process each: without locks, a process that dies blocks nobody.
    served, stop = context.RawArray("q", len(task.configurations)), context.RawValue("b", 0)
    with (
        _one_thread_per_process(),
        ProcessPoolExecutor(jobs, context, initializer=_receive, initargs=(task, served, stop)) as pool,
    ):
        futures = [pool.submit(_run, index) for index in range(len(task.configurations))]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    with _named(task, futures.index(future)):
                        future.result()
                if progress:
                    progress(sum(served), task.num_windows)
        except BaseException:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


_received: dict[str, Any] = {}
"""In a process that works: its task, counters and stop flag."""


def _receive(task: _Task, served: Any, stop: Any) -> None:
    _received.update(task=task, served=served, stop=stop)


def _run(index: int) -> Replay:
    def count(windows: int) -> None:
        _received["served"][index] += windows
        if _received["stop"].value:
            raise RuntimeError("another configuration failed")

    return _received["task"].run(index, count)


@contextmanager
def _named(task: _Task, index: int) -> Iterator[None]:
    """Say which configuration an error belongs to."""
    label = task.configurations[index].label
    try:
        yield
    except EplbError as error:
        raise EplbError(f"{error} This is configuration {index}, {label!r}.") from error
    except BrokenProcessPool as error:
        raise SimulationError(
            "A process of `sweep` ended before its work did: killed, out of memory, or unable to import the caller. "
            'Call `sweep` below `if __name__ == "__main__":`, or with jobs=1.'
        ) from error
    except Exception as error:
        raise SimulationError(f"`sweep` failed in configuration {index}, {label!r}: {error!r}.") from error


@contextmanager
def _one_thread_per_process() -> Iterator[None]:
    """Let processes that start now use one thread each in linear algebra, unless the user says otherwise."""
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
