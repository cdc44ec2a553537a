"""Which losses a placement survives, and what each would lead to."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Real

from eplb_core import _ops
from eplb_core._checks import check_choice, check_ids, check_room, require
from eplb_core.elastic import lose_ranks
from eplb_core.metrics import model_balancedness
from eplb_core.topology import Topology, check_topology


class Survival(NamedTuple):
    """What a placement loses with each rank and with each node.

    lost_with_rank: for each rank the (layer, expert) pairs of which it has all copies, sorted.
    lost_with_node: for each node likewise.
    """

    lost_with_rank: tuple[tuple[tuple[int, int], ...], ...]
    lost_with_node: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose loss leaves a copy of every expert."""
        return tuple(rank for rank, lost in enumerate(self.lost_with_rank) if not lost)

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes whose loss leaves a copy of every expert."""
        return tuple(node for node, lost in enumerate(self.lost_with_node) if not lost)


class Loss(NamedTuple):
    """What follows from the loss of some ranks.

    ranks: the ranks that are lost.
    lost: (layer, expert) pairs that no other rank holds: to be loaded from a checkpoint.
    lost_tokens: their share of all tokens, 0 to 1: those that nobody can serve until they are loaded.
    unhosted: (layer, expert) pairs for which there is no slot any more.
    num_moves: experts that the survivors must receive, those to be loaded among them.
    balancedness: of the survivors afterwards, all layers together.
    """

    ranks: tuple[int, ...]
    lost: tuple[tuple[int, int], ...]
    lost_tokens: float
    unhosted: tuple[tuple[int, int], ...]
    num_moves: int
    balancedness: float


def survivable(physical_to_logical: Int[Any, "layers slots"], topology: Topology) -> Survival:
    """Say which single losses of a rank or a node the placement survives.

    It survives a loss if every expert that has a copy still has one. Experts without any copy do not count.
    On the host; `O(layers * logical * ep_size)`.

    Args:
        physical_to_logical: `[layers, slots]` the placement.
        topology: its ranks and nodes.

    Raises:
        EplbError: if the shape does not fit.

    >>> survival = survivable(np.asarray([[0, 1, 1, 0, 2, 0]]), Topology(3, 2))
    >>> survival.ranks, survival.lost_with_rank
    ((0, 1), ((), (), ((0, 2),)))
    """
    check_topology(topology, "survivable")
    held = np.asarray(_ops.as_array(physical_to_logical))
    check_ids(held, topology.num_slots, "survivable(physical_to_logical=...)")
    check_room("survivable", len(held), topology.ep_size, int(held.max()) + 2)
    return Survival(*(_sole_holder(held, places) for places in (topology.ep_size, topology.num_nodes)))


def _sole_holder(held, num_places: int):
    """For each rank, or node, the (layer, expert) pairs that nobody else holds."""
    by_place = held.reshape(len(held), num_places, -1)
    holds = np.zeros((*by_place.shape[:2], int(held.max()) + 2), dtype=bool)
    layers, places = (np.arange(size) for size in by_place.shape[:2])
    holds[layers[:, None, None], places[:, None], by_place] = True  # EMPTY = -1 marks the spare last column
    sole = holds[:, :, :-1] & (holds[:, :, :-1].sum(axis=1, keepdims=True) == 1)
    return tuple(tuple((int(layer), int(e)) for layer, e in np.argwhere(sole[:, place])) for place in range(num_places))


def dry_run(
    physical_to_logical: Int[Any, "layers slots"],
    load: Real[Any, "*windows layers logical"],
    topology: Topology,
    *,
    level: str = "rank",
    **options: Any,
) -> tuple[Loss, ...]:
    """Lose each rank, or each node, in turn, and say what `elastic.lose_ranks` makes of it.

    Args:
        physical_to_logical: `[layers, slots]` the placement in force.
        load: `[layers, logical]` tokens per expert, or `[windows, layers, logical]`, of which the sum is used.
        topology: its ranks and nodes.
        level: `"rank"` or `"node"`.
        options: passed on to `lose_ranks`.

    Returns:
        One `Loss` per rank, or per node.

    Raises:
        EplbError: if there is only one rank, or only one node, or as `lose_ranks`.

    >>> loss = dry_run(np.asarray([[0, 1, 1, 0, 2, 0]]), np.asarray([[4, 4, 2]]), Topology(3, 2))[2]
    >>> loss.lost, loss.lost_tokens, loss.num_moves, loss.balancedness
    (((0, 2),), 0.2, 1, 0.83...)
    """
    check_choice(level, ("rank", "node"), "dry_run(level=...)")
    check_topology(topology, "dry_run")
    num_places = topology.ep_size if level == "rank" else topology.num_nodes
    require(
        num_places > 1,
        f"`dry_run(level={level!r})` needs two of them at least",
        f"{num_places}",
        "There is nobody left after the loss of all.",
    )
    survival = survivable(physical_to_logical, topology)
    all_lost = survival.lost_with_rank if level == "rank" else survival.lost_with_node
    places = np.arange(topology.ep_size).reshape(num_places, -1).tolist()
    lose = partial(_lose, physical_to_logical, load, topology, options)
    return tuple(lose(tuple(ranks), lost) for ranks, lost in zip(places, all_lost, strict=True))


def _lose(held, load, topology: Topology, options, ranks: tuple[int, ...], lost) -> Loss:
    plan = lose_ranks(held, load, topology, ranks, **options)
    tokens = np.asarray(_ops.as_array(load))
    tokens = tokens.sum(axis=0) if tokens.ndim == 3 else tokens
    lost_tokens = sum(float(tokens[pair]) for pair in lost) / max(float(tokens.sum()), 1.0)
    balance = float(model_balancedness(plan.placement, tokens, plan.topology))
    return Loss(ranks, lost, lost_tokens, plan.unhosted, plan.num_moves, balance)
