"""What a change of placement costs in traffic and time, and what a window costs to serve."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Real

from eplb_core._checks import check_indices, check_kind, check_number, require
from eplb_core.moves import MovePlan, plan_moves
from eplb_core.rounds import Schedule, schedule_rounds
from eplb_core.topology import Topology, check_topology


@dataclass(frozen=True, slots=True)
class Links:
    """How fast one rank sends, and at the same time receives. Bytes and seconds.

    Args:
        within_node: bytes per second between ranks of a node. The default is two thirds of NVLink 4's 450 GB/s.
        across_nodes: bytes per second of a rank's share of the network between nodes. The default is four fifths of
            a 400 Gbit/s port.
        latency: seconds to start one round of messages.

    Raises:
        EplbError: if a bandwidth is not positive or the latency is negative.
    """

    within_node: float = 300e9
    across_nodes: float = 40e9
    latency: float = 50e-6

    def __post_init__(self):
        for name in ("within_node", "across_nodes"):
            value = getattr(self, name)
            advice = "Bytes per second; use infinity for a link that costs nothing."
            if not (isinstance(value, float) and value == math.inf):
                check_number(value, f"Links({name}=...)", 1e-9, advice=advice)
        check_number(self.latency, "Links(latency=...)", 0, advice="Seconds; use 0 to count bytes only.")


@dataclass(frozen=True, slots=True)
class Costs:
    """What serving and moving cost. The defaults are a DeepSeek-V3 expert in FP8.

    Serving is taken to be bound by computation: a rank needs time in proportion to its tokens. Where few tokens are
    served at a time (decode), reading weights takes the time instead, and balance gains less than is said here.

    Args:
        bytes_per_expert: bytes of all tensors of one expert in one layer; 3 x 7168 x 2048 by default.
        seconds_per_token: seconds that one expert takes for one token; by default 88 MFLOP at 440 TFLOP/s.
        scale: tokens served for each one in the trace; above 1 where the trace is a sample of the traffic.
        links: bandwidths and latency.
        overlapped: whether weights move while the model serves, so that moving adds nothing to the critical path.

    Raises:
        EplbError: if a figure is out of range.
    """

    bytes_per_expert: int = 3 * 7168 * 2048
    seconds_per_token: float = 2e-7
    scale: float = 1.0
    links: Links = Links()
    overlapped: bool = False

    def __post_init__(self):
        advice = "Measure it, or work it out from the model's configuration."
        check_number(self.bytes_per_expert, "Costs(bytes_per_expert=...)", 0, 2.0**63, advice)
        check_number(self.seconds_per_token, "Costs(seconds_per_token=...)", 0, 1e12, advice)
        check_number(self.scale, "Costs(scale=...)", 0, 1e12, "Use 1 where the trace counts every token.")
        require(self.scale > 0, "`Costs(scale=...)` must be > 0", f"scale={self.scale}", "Use 1 without a sample.")
        check_kind(self.links, Links, "Costs(links=...)")
        check_kind(self.overlapped, bool, "Costs(overlapped=...)")

    def serving_seconds(self, busiest_load: Real[Any, "*windows layers"]) -> Real[np.ndarray, "*windows"]:
        """Add up over layers the time in which the busiest rank serves its tokens.

        >>> Costs(seconds_per_token=0.5, scale=10).serving_seconds(np.asarray([[3, 1], [2, 2]])).tolist()
        [20.0, 20.0]
        """
        return np.asarray(busiest_load).sum(axis=-1) * (self.seconds_per_token * self.scale)


class Migration(NamedTuple):
    """What one change of placement sends.

    moved_experts: (layer, rank, expert) that a rank must receive.
    bytes_moved: their bytes.
    bytes_across_nodes: those of them that leave a node.
    rounds: rounds of messages, all layers together.
    seconds: time until the last byte has arrived.
    """

    moved_experts: int
    bytes_moved: int
    bytes_across_nodes: int
    rounds: int
    seconds: float


def migration_cost(
    old: Int[Any, "layers slots"],
    new: Int[Any, "layers slots"],
    topology: Topology,
    costs: Costs,
    *,
    plan: MovePlan | None = None,
) -> Migration:
    """Price the moves of `plan_moves` in the rounds of `schedule_rounds`, all layers together.

    A rank sends one message at a time and receives one at a time, and does both at once. So it needs the larger of
    its sending and its receiving time, each of which is the bytes within the node over `links.within_node` plus the
    bytes across nodes over `links.across_nodes`. The migration takes as long as the rank that needs longest, and
    `links.latency` for every round. Time that ranks wait for each other within a round is not counted.

    Args:
        old: `[layers, slots]` the placement in force.
        new: `[layers, slots]` the placement to come.
        topology: sizes of both.
        costs: bytes per expert, and links.
        plan: from `plan_moves`, where it is known already.

    Returns:
        `Migration`.

    Raises:
        EplbError: as `plan_moves`.

    >>> costs = Costs(bytes_per_expert=600, links=Links(within_node=300, across_nodes=100, latency=0.25))
    >>> migration_cost(np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 2, 2, 3]]), Topology(2, 2), costs).seconds
    2.25
    >>> migration_cost(np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 2, 2, 3]]), Topology(2, 2, 2), costs).seconds
    6.25
    """
    check_kind(costs, Costs, "migration_cost(costs=...)")
    schedule = schedule_rounds(plan_moves(old, new, topology) if plan is None else plan, topology)
    sent = transfer_matrix(schedule, topology)
    node = np.arange(topology.ep_size) // topology.ranks_per_node
    crossing = np.where(node[:, None] != node, sent, 0)
    seconds_per_expert = (
        costs.bytes_per_expert / costs.links.within_node,
        costs.bytes_per_expert / costs.links.across_nodes,
    )
    busy = [
        (sent - crossing).sum(axis=side) * seconds_per_expert[0] + crossing.sum(axis=side) * seconds_per_expert[1]
        for side in (0, 1)
    ]
    moved = int(sent.sum())
    return Migration(
        moved_experts=moved,
        bytes_moved=moved * costs.bytes_per_expert,
        bytes_across_nodes=int(crossing.sum()) * costs.bytes_per_expert,
        rounds=schedule.num_rounds,
        seconds=float(np.max(busy)) + schedule.num_rounds * costs.links.latency,
    )


def transfer_matrix(schedule: Schedule, topology: Topology) -> Int[np.ndarray, "ep_size ep_size"]:
    """Count the experts that each rank (row) sends to each rank (column), all layers together.

    Raises:
        EplbError: if the schedule is of other ranks.

    >>> from eplb_core.moves import MovePlan
    >>> topology = Topology(ep_size=2, slots_per_rank=2)
    >>> transfer_matrix(schedule_rounds(MovePlan(np.asarray([[2, 1, 2, 3]])), topology), topology).tolist()
    [[0, 0], [1, 0]]
    """
    check_topology(topology, "transfer_matrix")
    check_kind(schedule, Schedule, "transfer_matrix(schedule=...)")
    for name, ranks in (("src_rank", schedule.src_rank), ("dst_rank", schedule.dst_rank)):
        advice = "Make it with schedule_rounds, for this topology."
        check_indices(ranks, topology.ep_size, f"transfer_matrix(schedule={name}...)", "ranks", advice)
    pair = schedule.src_rank.astype(np.int64) * topology.ep_size + schedule.dst_rank
    return np.bincount(pair, minlength=topology.ep_size**2).reshape(topology.ep_size, topology.ep_size)
