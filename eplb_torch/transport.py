"""How bytes travel between ranks: the one interface that executors use, and its implementations."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from eplb_core._checks import EplbError, require

Message = tuple[int, Tensor]
"""A peer's rank and a contiguous uint8 tensor to send to it or to receive from it."""


class TransportError(RuntimeError):
    """A peer did not answer in time, or the connection to it failed."""


class Transport(Protocol):
    """Messages between the ranks of one expert-parallel group. Every call returns or raises within its timeout.

    rank: this process's ep_rank.
    size: ranks in the group.
    """

    rank: int
    size: int

    def all_gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Give every rank the payloads of all ranks, in rank order. Payloads have equal lengths on all ranks.

        Raises:
            TransportError: if not all ranks took part within `timeout` seconds.
        """
        ...

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """Send and receive all messages; return when buffers may be reused.

        At most one message goes to each peer and one comes from each. Every receive is matched by the peer's send
        of the same number of bytes in the same call.

        Raises:
            TransportError: if not all messages went through within `timeout` seconds.
        """
        ...


class ProcessGroupTransport:
    """Messages over a `torch.distributed` process group: the same code for NCCL and Gloo.

    Tensors must be on the device that the group's backend serves. Messages carry no tag: per pair of ranks they
    match in the order of calls, so all ranks must make the same calls.

    Args:
        group: the expert-parallel group; the default group if None. A group of its own keeps messages apart from
            the model's collectives.
        device: where the control messages live; by default CPU for Gloo and the current accelerator for others.

    Raises:
        EplbError: if torch.distributed is not initialised or this process is not in the group.

    Not verified: NCCL, for want of a GPU where this library is tested. Gloo is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, device: torch.device | str | None = None):
        require(
            dist.is_available() and dist.is_initialized(),
            "`ProcessGroupTransport` needs torch.distributed",
            "no initialised default process group",
            "Call torch.distributed.init_process_group first.",
        )
        self.group = group if group is not None else dist.group.WORLD
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        require(
            self.rank >= 0,
            "`ProcessGroupTransport(group=...)` must contain this process",
            f"global rank {dist.get_rank()} outside the group",
            "Build it on members only.",
        )
        self.device = torch.device(device) if device is not None else _backend_device(self.group)

    def all_gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """See `Transport.all_gather`."""
        deadline = time.monotonic() + timeout
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(theirs, mine, group=self.group, async_op=True)
            self._finish([work], deadline)
        except RuntimeError as error:
            raise TransportError(f"all_gather failed on rank {self.rank}: {error}") from error
        return [tensor.cpu().numpy().tobytes() for tensor in theirs]

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        deadline = time.monotonic() + timeout
        ops = [self._op(dist.isend, peer, tensor) for peer, tensor in sends]
        ops += [self._op(dist.irecv, peer, tensor) for peer, tensor in recvs]
        if not ops:
            return
        try:
            self._finish(dist.batch_isend_irecv(ops), deadline)
        except RuntimeError as error:
            raise TransportError(f"messages of rank {self.rank} failed: {error}") from error

    def _op(self, verb, peer: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(verb, tensor, dist.get_global_rank(self.group, peer), group=self.group)

    def _finish(self, works, deadline: float) -> None:
        """Wait on the host. Work on an accelerator only orders streams, so its completion is polled for."""
        for work in works:
            left = max(deadline - time.monotonic(), 1e-3)
            work.wait(timedelta(seconds=left))
        if self.device.type == "cpu":
            return
        done = torch.Event(self.device)
        done.record()
        while not done.query():
            if time.monotonic() > deadline:
                raise TransportError(f"rank {self.rank} waited past its deadline for the device")
            time.sleep(1e-4)


def _backend_device(group) -> torch.device:
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise EplbError(
            f"`ProcessGroupTransport(group=...)` needs a device for backend {dist.get_backend(group)!r}; got no "
            "accelerator. Use a Gloo group, or pass device=..."
        )
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
