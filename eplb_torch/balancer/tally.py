"""Tokens that one rank has counted since they were last taken, in memory that is never allocated anew."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from eplb_core._checks import require
from eplb_torch.live_model import ServedModel


class Tally:
    """Adds up the loads of steps for one model.

    Loads are tokens per logical expert, or per slot. The latter are credited to experts by the placement in force:
    call `settle` for the layers of a commit, before it.

    Args:
        model: whose load it is.
    """

    def __init__(self, model: ServedModel):
        self._model = model
        layers, device = model.weights.num_layers, model.weights.device
        self._logical = torch.zeros((layers, model.num_logical), dtype=torch.int64, device=device)
        self._slots = torch.zeros((layers, model.topology.num_slots), dtype=torch.int64, device=device)
        self._counts_slots = False

    def add(self, load: Int[Tensor, "layers ids"]) -> None:
        """Add one step's tokens, `[layers, logical]`.

        Raises:
            EplbError: if the load has another shape or does not hold integers.
        """
        _check(load, self._logical)
        self._logical.add_(load)

    def add_slots(self, load: Int[Tensor, "layers slots"]) -> None:
        """Add one step's tokens per slot, `[layers, slots]`, counted under the placement in force.

        Raises:
            EplbError: if the load has another shape or does not hold integers.
        """
        _check(load, self._slots)
        self._slots.add_(load)
        self._counts_slots = True

    def settle(self) -> None:
        """Credit what slots have counted to the experts that they hold now. Call it before their placement changes."""
        if not self._counts_slots:
            return
        placement = torch.from_numpy(self._model.placement).to(self._slots.device, torch.int64)
        held = placement >= 0
        self._logical.scatter_add_(1, placement.clamp(min=0), self._slots * held)
        self._slots.zero_()
        self._counts_slots = False

    def take(self) -> Int[np.ndarray, "layers logical"]:
        """Hand out the tokens per expert on the host, and begin from zero."""
        self.settle()
        taken = self._logical.cpu().numpy().copy()
        self._logical.zero_()
        return taken


def _check(load: Tensor, total: Tensor) -> None:
    if load.shape != total.shape or load.dtype.is_floating_point or load.dtype.is_complex or load.dtype == torch.bool:
        require(
            False,
            f"`ExpertBalancer.step(load=...)` must be integers of shape {tuple(total.shape)}",
            f"shape={tuple(load.shape)}, dtype={load.dtype}",
            "Pass the tokens of this rank since the last step, per logical expert; or slot_load, per slot.",
        )
