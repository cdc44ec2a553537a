"""Processes that share a store, and a parent that ends them all at the first failure but the one that it plans."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_HOST = "127.0.0.1"
_GRACE_SECONDS = 1.0
_STORE_SECONDS = 60.0  # that a rank may wait for the parent's store
_PRELOAD = ["transformers.models.qwen3_moe.modeling_qwen3_moe", "eplb_torch.demo.serving"]

Send = Callable[[Any], None]
"""Passes a picklable message to the parent."""

Kill = Callable[[Any], int | None]
"""Says after a message which rank to kill now, or None."""


class Killed(NamedTuple):
    """A rank was killed, with SIGKILL, as it was asked for.

    rank: which.
    at: seconds, as `time.monotonic` counts them on this machine, in any process.
    """

    rank: int
    at: float


class RankFailure(RuntimeError):
    """A rank raised, died or did not finish in time. The text says which, and what it said last."""


def prepare_ranks() -> None:
    """Start to import the model's libraries in the background, once for all ranks that `run_ranks` starts later."""
    if _start_method() == "forkserver":
        forkserver.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()


def run_ranks(
    worker: Callable[..., None], ep_size: int, *args: Any, timeout: float, kill: Kill = lambda _: None
) -> Generator[Any, None, None]:
    """Run `worker(rank, send, store, *args)` on `ep_size` processes and yield what they send.

    The parent serves the store, which therefore outlives every rank. No process outlives the iteration, whether it
    ends, raises or is abandoned.

    Args:
        worker: a function at module level. It and `args` must be picklable.
        ep_size: processes to start.
        args: given to every rank.
        timeout: seconds that all of it may take.
        kill: may have a rank killed after a message. That it dies is no failure.

    Yields:
        Messages, in the order in which each rank sent them, and a `Killed` after the one after which a rank was killed.

    Raises:
        RankFailure: soon after the first failure, with all that went wrong.
    """
    context: Any = multiprocessing.get_context(_start_method())
    server = _store(0, is_master=True)
    processes, pipes = {}, {}
    try:
        for rank in range(ep_size):
            pipes[rank], theirs = context.Pipe(duplex=False)
            job = (theirs, worker, rank, ep_size, server.port, args)
            processes[rank] = context.Process(target=_rank_main, args=job, daemon=True)
            processes[rank].start()
            theirs.close()
        yield from _follow(pipes, processes, time.monotonic() + timeout, kill)
    finally:
        for process in processes.values():
            process.kill()
        for rank, process in processes.items():
            process.join()
            pipes[rank].close()
        del server


def _follow(pipes: dict[int, Connection], processes: dict[int, Any], deadline: float, kill: Kill) -> Iterator[Any]:
    running, killed, failures = dict(pipes), set[int](), []
    while running:
        ready = wait(running.values(), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(running)} had not finished and were stopped")
            break
        for rank in [rank for rank in running if running[rank] in ready]:
            kind, value = _receive(running[rank], processes[rank])
            if kind == "message":
                victim = kill(value)
                at = time.monotonic()
                if victim is not None:
                    killed.add(victim)
                    processes[victim].kill()
                yield value
                if victim is not None:
                    yield Killed(victim, at)
                continue
            del running[rank]
            if kind == "failure" and rank not in killed:
                failures.append(f"rank {rank} {value}")
                # Ranks that wait for a lost one fail because of it, maybe sooner than its own end is seen.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise RankFailure("\n".join(failures))


def _receive(pipe: Connection, process: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, OSError):  # the latter where it died in the middle of a message
        process.join(_GRACE_SECONDS)
        return "failure", f"died with exit code {process.exitcode}"


def _rank_main(
    pipe: Connection, worker: Callable[..., None], rank: int, ep_size: int, port: int, args: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its ranks
    torch.set_num_threads(max((os.cpu_count() or 1) // ep_size, 1))
    status = 0
    try:
        worker(rank, lambda value: pipe.send(("message", value)), _store(port, is_master=False), *args)
        pipe.send(("end", None))
    except BaseException:
        status = 1
        with suppress(OSError):
            pipe.send(("failure", f"raised\n{traceback.format_exc()}"))
    pipe.close()
    # Without the threads of the process groups, which may wait for peers that are gone.
    os._exit(status)


def _store(port: int, *, is_master: bool) -> Any:
    limit = timedelta(seconds=_STORE_SECONDS)
    make_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    return make_store(_HOST, port, is_master=is_master, wait_for_workers=False, timeout=limit)


def _start_method() -> str:
    """Forking from a server that has the libraries loaded saves their import in each rank."""
    return "forkserver" if sys.platform == "linux" else "spawn"
