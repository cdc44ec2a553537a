"""The tallies of several models, kept once for each purpose."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from eplb_core._checks import require
from eplb_torch.balancer.tally import Tally
from eplb_torch.live_model import ServedModel

Tokens = Tensor | Mapping[str, Tensor] | None
"""Of the only model, or by name."""


class Tallies:
    """What one rank counts, for decisions and for whoever else needs it at other times.

    Args:
        models: by name.
        others: tallies of the same models that are taken by others.
    """

    def __init__(self, models: Mapping[str, ServedModel], *others: Mapping[str, Tally]):
        self._own = {name: Tally(model) for name, model in models.items()}
        self._all = (self._own, *others)

    def add(self, load: Tokens, slot_load: Tokens) -> None:
        """Add one step's tokens; see `ExpertBalancer.step`.

        Raises:
            EplbError: if a load does not fit its model, or is of none.
        """
        for given, verb in ((load, Tally.add), (slot_load, Tally.add_slots)):
            for name, tokens in self._by_name(given).items():
                for tallies in self._all:
                    verb(tallies[name], tokens)

    def settle(self, name: str) -> None:
        """Credit what slots have counted to the experts that they hold now. Call it before their placement changes."""
        for tallies in self._all:
            tallies[name].settle()

    def take(self) -> dict[str, np.ndarray]:
        """Hand out the tokens per expert for a decision, int64 `[layers, logical]` by model, and begin from zero."""
        return {name: tally.take() for name, tally in self._own.items()}

    def _by_name(self, load: Tokens) -> Mapping[str, Tensor]:
        if load is None:
            return {}
        if isinstance(load, Tensor) and len(self._own) == 1:
            return {name: load for name in self._own}
        require(
            isinstance(load, Mapping) and set(load) <= set(self._own),
            f"`ExpertBalancer.step(load=...)` must be a dict with names of {list(self._own)}",
            f"{sorted(load) if isinstance(load, Mapping) else type(load).__name__}",
            "A bare tensor will do where there is only one model.",
        )
        assert isinstance(load, Mapping)
        return load
