"""Run one function on several real processes that share a process group, and never hang."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 2.0
_PRELOAD = ["torch.distributed", "transformers.modeling_utils"]


class RankError(AssertionError):
    """One or more ranks failed; the text holds the traceback of each, the first to fail first."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    backend: str = "gloo",
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` processes whose default process group is initialised.

    Processes are forked from one server that has torch loaded, so that a world starts fast; they see the
    environment variables of the first call. Warnings are errors in the ranks too. After the first failure the
    others get `GRACE_SECONDS` to say what they saw.

    Args:
        fn: a function at module level. It and `args` must be picklable.
        world_size: number of processes, each with one torch thread.
        args: given to every rank.
        timeout: seconds for the whole world, start included. The process group's own is a little shorter.
        backend: of the process group.
        may_die: ranks that may end without a result; theirs is None.

    Returns:
        What each rank returned, rank 0 first.

    Raises:
        RankError: if a rank raises, dies, or is not done in time. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes, pipes = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                job = (theirs, fn, rank, world_size, args, store, backend, timeout)
                process = context.Process(target=_rank_main, args=job, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, processes, timeout, may_die)
        finally:
            for process in processes:
                process.kill()
            for process, pipe in zip(processes, pipes, strict=True):
                process.join()
                pipe.close()


def _rank_main(
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    store: str,
    backend: str,
    timeout: float,
) -> None:
    try:
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            # Shorter than the world's own, so that who waits for a late rank can say where.
            timeout=timedelta(seconds=0.8 * timeout),
        )
        payload = pickle.dumps((True, fn(rank, *args)))
        dist.destroy_process_group()
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(payload)
    pipe.close()
    # A failed rank may have threads that still wait for its peers.
    os._exit(0)


def _collect(pipes: list[Connection], processes: list[Any], timeout: float, may_die: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    failures: list[str] = []
    late = set(range(len(pipes)))
    deadline = time.monotonic() + timeout
    while late:
        ready = wait([pipes[rank] for rank in late], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(late)} of {len(pipes)} were not done in time and were killed.\n")
            break
        for rank in [rank for rank in sorted(late) if pipes[rank] in ready]:
            late.remove(rank)
            succeeded, value = _receive(pipes[rank], processes[rank], rank in may_die)
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankError("\n".join(failures))
    return results


def _receive(pipe: Connection, process: Any, may_die: bool) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(GRACE_SECONDS)
        return may_die, None if may_die else f"died with exit code {process.exitcode}\n"
