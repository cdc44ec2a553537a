"""Count tokens on the device, behind a switch, and never under two placements at once."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core._checks import check_count, check_room
from eplb_torch.dispatch import count_tokens


class LayerRecorder(NamedTuple):
    """The counter of one layer, as views into a `LoadRecorder`.

    counts: int64 `[ids]` tokens counted so far.
    gate: bool `[]` whether tokens are counted now.
    """

    counts: Tensor
    gate: Tensor

    def add(self, counts: Int[Tensor, " ids"]) -> None:
        """Add counts, if the gate is open. No host synchronisation; opening the gate compiles nothing anew."""
        self.counts.add_(counts * self.gate)

    def record(self, ids: Int[Tensor, "*tokens"]) -> None:
        """Count ids, if the gate is open; those out of range, `EMPTY` among them, are padding."""
        self.add(count_tokens(ids, self.counts.shape[0]))


class Recorded(NamedTuple):
    """What was counted, and under which placements.

    counts: int64 `[layers, ids]`, on the device; valid until the next `take`.
    epoch: int64 `[layers]`, on the host: the epoch of each layer's placement while it was counted.
    """

    counts: Tensor
    epoch: Int[np.ndarray, " layers"]


class LoadRecorder:
    """Token counts of all layers, in tensors that keep their addresses for as long as this object lives.

    Slot counts mean something only together with the placement under which they were counted. So every layer has an
    epoch, and starting a new one drops what was not taken under the old one: `take` before a layer is committed.

    Args:
        num_layers: MoE layers.
        num_ids: slots or experts of a layer, whichever is counted.
        device: of the tokens.
        epoch: of the placement in force.
        enabled: whether to count from the start.

    >>> recorder = LoadRecorder(num_layers=2, num_ids=3)
    >>> recorder.layer(1).record(torch.tensor([[0, 2], [2, -1]]))
    >>> recorder.enabled = False
    >>> recorder.layer(1).record(torch.tensor([[1, 1]]))
    >>> recorder.take().counts.tolist()
    [[0, 0, 0], [1, 0, 2]]
    """

    def __init__(
        self,
        num_layers: int,
        num_ids: int,
        *,
        device: torch.device | str | None = None,
        epoch: int = 0,
        enabled: bool = True,
    ):
        num_layers = check_count(num_layers, "LoadRecorder(num_layers=...)", 1)
        num_ids = check_count(num_ids, "LoadRecorder(num_ids=...)", 1)
        check_room("LoadRecorder", num_layers, num_ids)
        self.counts = torch.zeros((num_layers, num_ids), dtype=torch.int64, device=device)
        self.gate = torch.tensor(enabled, device=device)
        self._enabled = enabled
        self._taken = torch.zeros_like(self.counts)
        epoch = check_count(epoch, "LoadRecorder(epoch=...)")
        self._epoch = np.full(num_layers, epoch, dtype=np.int64)

    @property
    def enabled(self) -> bool:
        """Whether tokens are counted. Setting it writes to the device, ordered by the current stream."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)
        self.gate.fill_(self._enabled)

    def layer(self, index: int) -> LayerRecorder:
        """The counter of one layer."""
        index = check_count(index, "LoadRecorder.layer(index=...)", 0, len(self.counts) - 1, "Count layers from 0.")
        return LayerRecorder(self.counts[index], self.gate)

    def take(self) -> Recorded:
        """Hand out the counts since the last call, and count from zero again. Allocates nothing on the device."""
        self._taken.copy_(self.counts)
        self.counts.zero_()
        return Recorded(self._taken, self._epoch.copy())

    def start_epoch(self, epoch: int, *, layer: int | None = None) -> None:
        """Tag what is counted from now on, in all layers or one; what they have counted since `take` is dropped."""
        where = slice(None) if layer is None else layer
        self.counts[where].zero_()
        self._epoch[where] = epoch
