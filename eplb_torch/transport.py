"""How bytes travel between ranks: the one interface that executors use, and its process-group implementation."""

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from eplb_core._checks import EplbError, require

Message = tuple[int, Tensor]
"""A peer's rank and a contiguous uint8 tensor to send to it or to receive from it."""

_TAGS_PER_EPOCH = 4096  # half of them for exchanges, half for gathers
_LOOK_AGAIN_SECONDS = 0.2
# Where a wait on Gloo runs out of time, and be it that of the group, Gloo closes all connections of the group.
_FOREVER = timedelta(days=365)


class TransportError(RuntimeError):
    """A peer did not answer in time, or the connection to it failed."""


class Transport(Protocol):
    """Messages between the ranks of one expert-parallel group. Every call returns or raises within its timeout.

    All ranks make the same calls in the same order, from one thread at a time. A `gather` ends whatever went before:
    messages of an `exchange` that failed on some ranks are never taken for messages after the next `gather`.

    rank: this process's ep_rank.
    size: ranks in the group.
    """

    rank: int
    size: int

    def connect(self, timeout: float) -> None:
        """Make all connections that would otherwise be made on first use. Every rank calls it; later calls are free.

        Raises:
            TransportError: if not all ranks took part within `timeout` seconds.
        """
        ...

    def gather(self, payload: bytes, timeout: float) -> list[bytes | None]:
        """Give every rank the payloads of all ranks, in rank order. Payloads have equal lengths on all ranks.

        Returns:
            The payload of each rank; None for ranks that were not heard within `timeout` seconds. Such a rank does
            not keep others from being heard, now or in later calls.
        """
        ...

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """Send and receive all messages; return when buffers may be reused.

        Messages of a pair of ranks match in order, those of one call only with each other, and matching ones have
        the same number of bytes.

        Raises:
            TransportError: if not all messages went through within `timeout` seconds. Messages may still arrive
                in the buffers afterwards: let go of these.
        """
        ...


class ProcessGroupTransport:
    """Messages over a `torch.distributed` process group: the same code for Gloo and for NCCL.

    Building one is a collective over the group's members if the group has no CPU backend, and local otherwise. A
    group of its own keeps messages apart from the model's collectives, which is a must where both run at the same
    time, as under `Rearrangement`.

    On Gloo nothing here closes a connection: a wait that ran out of time is left to a daemon thread, as Gloo
    answers a timeout of its own by closing *all* connections of the process, to healthy peers as well. The thread,
    and the buffer, stay until the message comes or the group is broken.

    On NCCL, which knows neither tags nor timeouts of single messages, messages match by order alone, all ranks join
    one collective before the first message, and small payloads travel over a Gloo group beside it. After a
    timeout the device may still wait for the peer: abort the NCCL group and build a new one.

    Args:
        group: the expert-parallel group; the default group if None.
        device: where rows lie; by default CPU for Gloo and the current accelerator for others.
        control: a group of the same ranks with a CPU backend, for small payloads; by default `group` itself if it
            has one, else a new Gloo group.

    Raises:
        EplbError: if torch.distributed is not initialised or this process is not in the group.

    Not verified: NCCL, for want of a GPU where this library is tested. Gloo is.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        control: dist.ProcessGroup | None = None,
    ):
        require(
            dist.is_available() and (group is not None or dist.is_initialized()),
            "`ProcessGroupTransport` needs torch.distributed",
            "no initialised default process group",
            "Call torch.distributed.init_process_group first.",
        )
        self.group: Any = group if group is not None else dist.group.WORLD
        require(
            isinstance(self.group, dist.ProcessGroup),
            "`ProcessGroupTransport(group=...)` must contain this process",
            "the placeholder of a group that it is not in",
            "Build it on members only.",
        )
        self.rank, self.size = self.group.rank(), self.group.size()
        self.device = torch.device(device) if device is not None else _backend_device(self.group)
        self.control: Any = control if control is not None else _control_group(self.group)
        self._connected = self.device.type == "cpu"
        self._gathers = self._exchanges = 0
        self._waiter = _Waiter()

    def connect(self, timeout: float) -> None:
        """See `Transport.connect`."""
        if self._connected:
            return
        # A lazily made communicator needs all ranks; messages between some of them would wait for the rest.
        try:
            work = dist.all_reduce(torch.zeros(1, device=self.device), group=self.group, async_op=True)
            self._finish_on_device([work], time.monotonic() + timeout)
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank} could not connect: {error}") from error
        self._connected = True

    def gather(self, payload: bytes, timeout: float) -> list[bytes | None]:
        """See `Transport.gather`."""
        deadline = time.monotonic() + timeout
        self._gathers, self._exchanges = self._gathers + 1, 0
        peers = [peer for peer in range(self.size) if peer != self.rank]
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in peers]
        recvs = [self._post(self.control.recv, buffer, peer) for buffer, peer in zip(theirs, peers, strict=True)]
        sends = [self._post(self.control.send, mine, peer) for peer in peers]
        arrived = self._waiter.finish([*recvs, *sends], deadline)[: len(peers)]
        payloads: list[bytes | None] = [payload] * self.size
        for peer, buffer, result in zip(peers, theirs, arrived, strict=True):
            payloads[peer] = buffer.numpy().tobytes() if result is True else None
        return payloads

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        deadline = time.monotonic() + timeout
        self._exchanges += 1
        if not sends and not recvs:
            return
        if self.device.type != "cpu":
            self._exchange_on_device(sends, recvs, deadline)
            return
        peers = [peer for peer, _ in (*recvs, *sends)]
        works = [self._post(self.group.recv, tensor, peer) for peer, tensor in recvs]
        works += [self._post(self.group.send, tensor, peer) for peer, tensor in sends]
        results = self._waiter.finish(works, deadline)
        failed = [(peer, result) for peer, result in zip(peers, results, strict=True) if result is not True]
        if failed:
            ranks, why = sorted({peer for peer, _ in failed}), failed[0][1]
            detail = f"not done after {timeout:g} s" if why is None else str(why)
            raise TransportError(f"messages between rank {self.rank} and ranks {ranks} failed: {detail}")

    def _post(self, verb: Callable, tensor: Tensor, peer: int):
        """Start one message; a connection that is broken already is a result like any other."""
        half = _TAGS_PER_EPOCH // 2
        # Gloo ends the process where a message has another length than is waited for: a payload of another length,
        # from a rank that is elsewhere in its program after a failure, is for nobody.
        step = self._exchanges % half if self._exchanges else half + tensor.numel() % half
        tag = self._gathers % 2**18 * _TAGS_PER_EPOCH + step
        try:
            return verb([tensor], peer, tag)
        except RuntimeError as error:
            return error

    def _exchange_on_device(self, sends: Sequence[Message], recvs: Sequence[Message], deadline: float) -> None:
        ops = [self._op(dist.isend, peer, tensor) for peer, tensor in sends]
        ops += [self._op(dist.irecv, peer, tensor) for peer, tensor in recvs]
        try:
            self._finish_on_device(dist.batch_isend_irecv(ops), deadline)
        except RuntimeError as error:
            raise TransportError(f"messages of rank {self.rank} failed: {error}") from error

    def _op(self, verb, peer: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(verb, tensor, group=self.group, group_peer=peer)

    def _finish_on_device(self, works, deadline: float) -> None:
        """Wait on the host. Work on an accelerator only orders streams, so its completion is polled for."""
        for work in works:
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
        done = torch.Event(self.device)
        done.record()
        while not done.query():
            if time.monotonic() > deadline:
                raise TransportError(f"rank {self.rank} waited past its deadline for the device")
            time.sleep(1e-4)


class _Waiter:
    """Waits for works of Gloo on a daemon thread, which is left alone if they take too long.

    The thread ends with this object; one that was left alone ends with the work it waits for, or with the group.
    """

    def __init__(self):
        self._jobs: queue.SimpleQueue | None = None
        self._stop: weakref.finalize | None = None

    def finish(self, works: list, deadline: float) -> list:
        """Wait for all works. Returns for each True, the error it ended with, or None if it is not done by then."""
        results: list = [work if isinstance(work, RuntimeError) else None for work in works]
        left = deque(i for i, result in enumerate(results) if result is None)
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            self._stop = weakref.finalize(self, self._jobs.put, None)
            threading.Thread(target=_serve, args=(self._jobs,), daemon=True, name="eplb-wait").start()
        done = threading.Event()
        self._jobs.put((works, results, left, done))
        if not done.wait(max(deadline - time.monotonic(), 0.0)):
            assert self._stop is not None
            self._stop()
            self._jobs = self._stop = None
            self._look_at_each(works, results, left)
        return list(results)

    @staticmethod
    def _look_at_each(works: list, results: list, left: deque[int]) -> None:
        """The first work that is late hides those behind it."""
        for _ in range(len(left)):
            jobs = queue.SimpleQueue()
            jobs.put((works, results, left, threading.Event()))
            jobs.put(None)
            threading.Thread(target=_serve, args=(jobs,), daemon=True, name="eplb-wait").start()
        look_until = time.monotonic() + _LOOK_AGAIN_SECONDS
        while any(result is None for result in results) and time.monotonic() < look_until:
            time.sleep(0.005)


def _serve(jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        works, results, left, done = job
        # Each work is for one thread: the end of a message wakes one, and another would wait for it in vain.
        with suppress(IndexError):
            while True:
                i = left.popleft()
                try:
                    works[i].wait(_FOREVER)
                    results[i] = True
                except RuntimeError as error:
                    results[i] = error
        done.set()
        del job, works, results, left, done


def _control_group(group):
    if _has_cpu_backend(group):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _has_cpu_backend(group) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def _backend_device(group) -> torch.device:
    if group.name() == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise EplbError(
            f"`ProcessGroupTransport(group=...)` needs a device for backend {group.name()!r}; got no "
            "accelerator. Use a Gloo group, or pass device=..."
        )
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
