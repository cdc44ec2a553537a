"""Memory outside the weights: one buffer, cut from the front, that is kept for as long as the caller likes."""

import torch
from torch import Tensor

from eplb_core._checks import check_kind
from eplb_torch.weights import aligned


class Staging:
    """A buffer on one device that rows pass through. Grows only between uses.

    Args:
        device: of the weights.
    """

    def __init__(self, device: torch.device):
        check_kind(device, (torch.device, str), "Staging(device=...)")
        self.device = device
        self.peak = 0
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def capacity(self) -> int:
        """Bytes that can be taken without allocating."""
        return self._buffer.numel()

    def require(self, num_bytes: int) -> None:
        """Make room for so many bytes in all, while none are taken.

        Raises:
            torch.OutOfMemoryError: if the device has no such room; another RuntimeError on the CPU.
        """
        if num_bytes > self.capacity:
            self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before asking for more
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def touch(self) -> None:
        """Write to all of it, so that the operating system has given the pages by the time of the first use."""
        self._buffer.zero_()

    def take(self, num_bytes: int) -> Tensor:
        """Cut the next bytes: uint8 `[num_bytes]`, aligned."""
        start, self._used = self._used, self._used + aligned(num_bytes)
        assert self._used <= self.capacity, (self._used, self.capacity)
        self.peak = max(self.peak, self._used)
        return self._buffer[start : start + num_bytes]

    def mark(self) -> int:
        """Where the next bytes will be cut."""
        return self._used

    def release(self, mark: int = 0) -> None:
        """Give back everything that was taken since `mark`."""
        self._used = mark

    def discard(self) -> None:
        """Let go of the buffer, into which late messages may still be written; the next use allocates another."""
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._used = 0
