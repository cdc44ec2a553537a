"""Rows on an accelerator, messages between CPUs: for groups without a device backend that can be relied on."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from eplb_torch.transport import Message, ProcessGroupTransport


class StagedTransport:
    """Messages over a CPU group (Gloo), whatever device rows lie on.

    What is sent is copied to pinned host memory first, what is received goes there and is copied to the device. The
    host memory is kept and grows to the largest batch; `Rearrangement` and `rearrange` bound a batch by
    `max_staging_bytes`. Copies run on the current stream, and `exchange` returns when they are done.

    Args:
        cpu_group: of the ranks, with a CPU backend.
        pin_memory: use pinned memory, by default where there is an accelerator.

    Raises:
        EplbError: if torch.distributed is not initialised or this process is not in the group.

    Not verified: copies to and from an accelerator, for want of one where this library is tested. The paths through
    host memory are.
    """

    def __init__(self, cpu_group: dist.ProcessGroup | None = None, *, pin_memory: bool | None = None):
        self._inner = ProcessGroupTransport(cpu_group, device="cpu")
        self.rank, self.size = self._inner.rank, self._inner.size
        self._pin_memory = torch.accelerator.is_available() if pin_memory is None else pin_memory
        self._host = torch.empty(0, dtype=torch.uint8)

    def connect(self, timeout: float) -> None:
        """See `Transport.connect`."""
        self._inner.connect(timeout)

    def gather(self, payload: bytes, timeout: float) -> list[bytes | None]:
        """See `Transport.gather`."""
        return self._inner.gather(payload, timeout)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        tensors = [tensor for _, tensor in (*sends, *recvs)]
        host = self._cut([tensor.numel() for tensor in tensors])
        outgoing, incoming = host[: len(sends)], host[len(sends) :]
        for (_, tensor), buffer in zip(sends, outgoing, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        _synchronise(tensors)
        try:
            self._inner.exchange(
                [(peer, buffer) for (peer, _), buffer in zip(sends, outgoing, strict=True)],
                [(peer, buffer) for (peer, _), buffer in zip(recvs, incoming, strict=True)],
                timeout,
            )
        except RuntimeError:
            # Late messages may still be written there.
            self._host = torch.empty(0, dtype=torch.uint8)
            raise
        for (_, tensor), buffer in zip(recvs, incoming, strict=True):
            tensor.copy_(buffer, non_blocking=True)
        _synchronise(tensors)

    def _cut(self, sizes: list[int]) -> list[Tensor]:
        if sum(sizes) > self._host.numel():
            self._host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._pin_memory)
        return list(self._host[: sum(sizes)].split(sizes)) if sizes else []


def _synchronise(tensors: Sequence[Tensor]) -> None:
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is not None:
        torch.accelerator.current_stream(device).synchronize()
