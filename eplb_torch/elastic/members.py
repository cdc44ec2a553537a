"""The members of one generation of a group, and what may keep a process from being one."""

from typing import NamedTuple

from eplb_torch.transport import TransportError


class MembershipError(RuntimeError):
    """There was no agreement: the store failed, members did not come, or too few of the living did."""


class Evicted(MembershipError):
    """The others have gone on without this process. It must stop serving; to come back it joins under a new name."""


class MembersLost(TransportError):
    """The generation is over: members are silent or late, or others have begun to agree on the next one.

    Attributes:
        names: those who are missing; empty if it was others who found that out.
    """

    def __init__(self, reason: str, names: tuple[str, ...] = ()):
        self.names = names
        super().__init__(reason)


class Members(NamedTuple):
    """The members of one generation. Equal on all of them, but for `rank`.

    generation: counts agreements, from 0.
    names: of the processes, in rank order; those of a node are consecutive.
    nodes: of each.
    rank: this process's.
    """

    generation: int
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    rank: int

    @property
    def name(self) -> str:
        """This process's."""
        return self.names[self.rank]

    @property
    def size(self) -> int:
        """Members."""
        return len(self.names)

    @property
    def num_nodes(self) -> int:
        """Nodes, if each has equally many members, else 1: what `Topology` asks for.

        >>> Members(0, ("a", "b", "c", "d"), ("x", "x", "y", "y"), 0).num_nodes
        2
        >>> Members(1, ("a", "c", "d"), ("x", "y", "y"), 0).num_nodes
        1
        """
        per_node = [self.nodes.count(node) for node in dict.fromkeys(self.nodes)]
        return len(per_node) if len(set(per_node)) == 1 else 1
