"""The answer to a change of size: where every expert is before and after, and what moves alone do not cure."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core._checks import EMPTY, listing
from eplb_core.metrics import moved_experts
from eplb_core.moves import MovePlan, plan_moves
from eplb_core.topology import Topology


class ElasticPlan(NamedTuple):
    """How a group goes from one size to another. A value: build it with `lose_ranks`, `shrink` or `grow`.

    Weights move while the ranks of `group` exist: after a loss or a growth that is the new group, and before ranks
    leave it is the old one, so that they can still send.

    topology: the group after the change.
    placement: int32 `[layers, slots]` of `topology`. If there are fewer slots than experts, the experts with the
        fewest tokens have none.
    new_rank: int32 `[ep_size before]` what each rank is called after the change; `EMPTY` for one that is gone.
    group: the ranks among which weights move.
    old: int32 `[layers, slots]` of `group`: what is in place; `EMPTY` in slots that are new.
    new: int32 `[layers, slots]` of `group`: what shall be; `EMPTY` in slots of ranks that leave.
    unhosted: the (layer, expert) pairs without a slot in `placement`, sorted.
    num_logical: experts that the router knows.
    """

    topology: Topology
    placement: Any
    new_rank: Any
    group: Topology
    old: Any
    new: Any
    unhosted: tuple[tuple[int, int], ...]
    num_logical: int

    @property
    def complete(self) -> bool:
        """Whether every expert has a slot."""
        return not self.unhosted

    @property
    def min_slots_per_rank(self) -> int:
        """The fewest slots per rank with which the ranks of `topology` can host every expert."""
        return -(-self.num_logical // self.topology.ep_size)

    @property
    def num_moves(self) -> int:
        """Experts that ranks receive, in all layers together, from other ranks or from a checkpoint."""
        return int(moved_experts(self.old, self.new, self.group).sum())

    @property
    def reload(self) -> tuple[tuple[int, int], ...]:
        """The (layer, expert) pairs that `placement` needs and no rank of `group` holds, sorted: load them anew."""
        return tuple(sorted({(int(layer), int(expert)) for layer, _, expert in self.reload_slots()}))

    def reload_slots(self) -> Int[np.ndarray, "reloads 3"]:
        """List the slots of `group` to load from a checkpoint: rows of layer, slot and expert, int32, sorted."""
        held = np.stack([np.isin(new, old) for old, new in zip(self.old, self.new, strict=True)])
        layer, slot = np.nonzero(~held & (self.new != EMPTY))
        return np.stack([layer, slot, self.new[layer, slot]], axis=1).astype(np.int32)

    def moves(self, *, fan_out: str = "direct") -> MovePlan:
        """Plan the moves from `old` to `new` in `group`; slots to load from a checkpoint have an `EMPTY` source."""
        return plan_moves(self.old, self.new, self.group, fan_out=fan_out, allow_lost=True)

    def problems(self) -> tuple[str, ...]:
        """Say what moves alone do not cure, a sentence for each kind; empty if nothing is left to do."""
        found = []
        if self.reload:
            found.append(f"No rank holds the (layer, expert) pairs {listing(self.reload)}: load them anew.")
        if self.unhosted:
            found.append(
                f"There is no slot for the (layer, expert) pairs {listing(self.unhosted)}, which have the fewest "
                f"tokens: use slots_per_rank >= {self.min_slots_per_rank}, or more ranks."
            )
        return tuple(found)
