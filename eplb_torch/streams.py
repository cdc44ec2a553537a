"""The order of work on an accelerator: the worker of a rearrangement, and its caller."""

from contextlib import AbstractContextManager, nullcontext

import torch


class Streams:
    """Orders the worker's stream and the caller's on an accelerator; nothing on the CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._side = None if device.type == "cpu" else torch.Stream(device)
        self._event = None if self._side is None else torch.Event(device)
        self.after_commit()

    def side(self) -> AbstractContextManager:
        """The worker's stream, which starts when the caller's writes so far are done."""
        if self._side is None:
            return nullcontext()
        torch.accelerator.set_device_index(self._device.index or 0)
        self._order_after_commit()
        return self._side

    def before_commit(self) -> None:
        """Let the caller's stream wait for what the worker has put on its own."""
        if self._side is not None:
            torch.accelerator.current_stream(self._device).wait_stream(self._side)

    def after_commit(self) -> None:
        """Let the worker's stream wait for the copies of the commit before it reuses their memory."""
        if self._event is not None:
            self._event.record(torch.accelerator.current_stream(self._device))
            self._order_after_commit()

    def _order_after_commit(self) -> None:
        if self._side is not None and self._event is not None:
            self._side.wait_event(self._event)
