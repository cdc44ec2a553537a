"""Processes that share a process group, and a parent that outlives none of their failures."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_GRACE_SECONDS = 1.0
_PRELOAD = ["torch.distributed", "transformers.models.qwen3_moe.modeling_qwen3_moe"]

Send = Callable[[Any], None]
"""Passes a picklable message to the parent."""


class RankFailure(RuntimeError):
    """A rank raised, died or did not finish in time. The text says which, and what it said last."""


def prepare_ranks() -> None:
    """Start to import the model's libraries in the background, once for all ranks that `run_ranks` starts later."""
    if _start_method() == "forkserver":
        forkserver.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()


def run_ranks(
    worker: Callable[..., None], ep_size: int, *args: Any, timeout: float, group_timeout: float
) -> Generator[Any, None, None]:
    """Run `worker(rank, send, *args)` on `ep_size` processes of one Gloo group and yield what they send.

    No process outlives the iteration, whether it ends, raises or is abandoned.

    Args:
        worker: a function at module level. It and `args` must be picklable.
        ep_size: processes to start; they are the ranks of the default process group.
        args: given to every rank.
        timeout: seconds that all of it may take.
        group_timeout: seconds that a rank may wait for the others in one collective.

    Yields:
        Messages, in the order in which each rank sent them.

    Raises:
        RankFailure: soon after the first failure, with all that went wrong.
    """
    context: Any = multiprocessing.get_context(_start_method())
    with tempfile.TemporaryDirectory(prefix="eplb-") as folder:
        store = os.path.join(folder, "rendezvous")
        processes, pipes = {}, {}
        try:
            for rank in range(ep_size):
                pipes[rank], theirs = context.Pipe(duplex=False)
                job = (theirs, worker, rank, ep_size, store, group_timeout, args)
                processes[rank] = context.Process(target=_rank_main, args=job, daemon=True)
                processes[rank].start()
                theirs.close()
            yield from _follow(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes.values():
                process.kill()
            for rank, process in processes.items():
                process.join()
                pipes[rank].close()


def _follow(pipes: dict[int, Connection], processes: dict[int, Any], deadline: float) -> Iterator[Any]:
    running, failures = dict(pipes), []
    while running:
        ready = wait(running.values(), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(running)} had not finished and were stopped")
            break
        for rank in [rank for rank in running if running[rank] in ready]:
            kind, value = _receive(running[rank], processes[rank])
            if kind == "message":
                yield value
                continue
            del running[rank]
            if kind == "failure":
                failures.append(f"rank {rank} {value}")
                # Ranks that wait for a lost one fail because of it, maybe sooner than its own end is seen.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise RankFailure("\n".join(failures))


def _receive(pipe: Connection, process: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join(_GRACE_SECONDS)
        return "failure", f"died with exit code {process.exitcode}"


def _rank_main(
    pipe: Connection,
    worker: Callable[..., None],
    rank: int,
    ep_size: int,
    store: str,
    group_timeout: float,
    args: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its ranks
    status = 0
    try:
        _join_group(rank, ep_size, store, group_timeout)
        worker(rank, lambda value: pipe.send(("message", value)), *args)
        pipe.send(("end", None))
    except BaseException:
        status = 1
        with suppress(OSError):
            pipe.send(("failure", f"raised\n{traceback.format_exc()}"))
    pipe.close()
    # Without the threads of the process group, which may wait for peers that are gone.
    os._exit(status)


def _join_group(rank: int, ep_size: int, store: str, group_timeout: float) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // ep_size, 1))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ep_size,
        timeout=timedelta(seconds=group_timeout),
    )


def _start_method() -> str:
    """Forking from a server that has the libraries loaded saves their import in each rank."""
    return "forkserver" if sys.platform == "linux" else "spawn"
