"""The sizes of an expert-parallel group."""

import operator
from dataclasses import dataclass

from eplb_core._checks import require


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks, slots and nodes of an expert-parallel group. Hashable, hence static under `jax.jit`.

    Slot `p` lives on rank `p // slots_per_rank`; node `n` holds `ranks_per_node` consecutive ranks.

    Args:
        ep_size: ranks in the expert-parallel group, >= 1.
        slots_per_rank: experts that one rank holds per layer, >= 1.
        num_nodes: hosts, a divisor of `ep_size`.

    Raises:
        EplbError: if a size is smaller than one or the ranks do not split evenly over the nodes.

    >>> Topology(ep_size=4, slots_per_rank=3, num_nodes=2).num_slots
    12
    """

    ep_size: int
    slots_per_rank: int
    num_nodes: int = 1

    def __post_init__(self):
        for name in ("ep_size", "slots_per_rank", "num_nodes"):
            value = getattr(self, name)
            require(
                hasattr(value, "__index__") and not isinstance(value, bool) and operator.index(value) >= 1,
                f"`Topology({name}=...)` must be an integer >= 1",
                f"{name}={value!r}",
                "Count ranks, slots and nodes from one.",
            )
            object.__setattr__(self, name, operator.index(value))
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
            EplbError: if the slots do not split evenly; the message names the next number of redundant experts
                that does.

        >>> Topology.from_experts(256, 32, num_redundant=32).slots_per_rank
        9
        """
        sizes = f"num_logical={num_logical}, num_redundant={num_redundant}, ep_size={ep_size}"
        require(
            num_logical >= 1 and num_redundant >= 0 and ep_size >= 1,
            "`Topology.from_experts` needs num_logical >= 1, num_redundant >= 0 and ep_size >= 1",
            sizes,
            "Check the model's configuration.",
        )
        num_slots = num_logical + num_redundant
        require(
            num_slots % ep_size == 0,
            "`Topology.from_experts(num_redundant=...)` must make the slots split evenly over the ranks",
            sizes,
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
