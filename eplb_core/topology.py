"""The sizes of an expert-parallel group."""

from dataclasses import dataclass
from typing import Any

from eplb_core._checks import MOST_EXPERTS, check_count, check_kind, require

_MOST = {"ep_size": 2**14, "slots_per_rank": 2**16, "num_nodes": 2**14}
_ADVICE = "Count ranks, slots and nodes from one."


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks, slots and nodes of an expert-parallel group. Hashable, hence static under `jax.jit`.

    Slot `p` lives on rank `p // slots_per_rank`; node `n` holds `ranks_per_node` consecutive ranks.

    Args:
        ep_size: ranks in the expert-parallel group, 1..2**14.
        slots_per_rank: experts that one rank holds per layer, 1..2**16, and at most 2**20 on all ranks.
        num_nodes: hosts, a divisor of `ep_size`.

    Raises:
        EplbError: if a size is out of range or the ranks do not split evenly over the nodes.

    >>> Topology(ep_size=4, slots_per_rank=3, num_nodes=2).num_slots
    12
    """

    ep_size: int
    slots_per_rank: int
    num_nodes: int = 1

    def __post_init__(self):
        for name, most in _MOST.items():
            value = check_count(getattr(self, name), f"Topology({name}=...)", 1, most, _ADVICE)
            object.__setattr__(self, name, value)
        require(
            self.num_slots <= MOST_EXPERTS,
            f"`Topology(slots_per_rank=...)` must give at most {MOST_EXPERTS} slots to all ranks together",
            f"ep_size={self.ep_size}, slots_per_rank={self.slots_per_rank}",
            _ADVICE,
        )
        require(
            self.ep_size % self.num_nodes == 0,
            "`Topology(num_nodes=...)` must divide ep_size",
            f"ep_size={self.ep_size}, num_nodes={self.num_nodes}",
            "Use num_nodes=1 where ranks are spread unevenly over hosts.",
        )

    @classmethod
    def from_experts(cls, num_logical: int, ep_size: int, *, num_redundant: int = 0, num_nodes: int = 1) -> "Topology":
        """Build the topology that gives `num_logical + num_redundant` slots to `ep_size` ranks.

        Raises:
            EplbError: if a size is out of range, or the slots do not split evenly; then the message names the next
                number of redundant experts with which they do.

        >>> Topology.from_experts(256, 32, num_redundant=32).slots_per_rank
        9
        """
        name, advice = "Topology.from_experts", "Check the model's configuration."
        num_logical = check_count(num_logical, f"{name}(num_logical=...)", 1, MOST_EXPERTS, advice)
        num_redundant = check_count(num_redundant, f"{name}(num_redundant=...)", 0, MOST_EXPERTS, advice)
        ep_size = check_count(ep_size, f"{name}(ep_size=...)", 1, _MOST["ep_size"], advice)
        num_slots = num_logical + num_redundant
        require(
            num_slots % ep_size == 0,
            "`Topology.from_experts(num_redundant=...)` must make the slots split evenly over the ranks",
            f"num_logical={num_logical}, num_redundant={num_redundant}, ep_size={ep_size}",
            f"Use num_redundant={num_redundant + -num_slots % ep_size}.",
        )
        return cls(ep_size, num_slots // ep_size, num_nodes)

    @property
    def num_slots(self) -> int:
        """Slots in one layer over all ranks."""
        return self.ep_size * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks that share a node."""
        return self.ep_size // self.num_nodes

    @property
    def slots_per_node(self) -> int:
        """Consecutive slots that share a node."""
        return self.ranks_per_node * self.slots_per_rank


def check_topology(topology: Any, name: str) -> None:
    """Refuse what is not a `Topology`, such as the numbers that one is made of."""
    check_kind(topology, Topology, f"{name}(topology=...)")
