"""What a placement loses with a rank or a node, and what a dry run says of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology, model_balancedness
from eplb_core.elastic import lose_ranks
from eplb_core.elastic.survive import dry_run, survivable
from eplb_core.testing import loads, placements, topologies


@st.composite
def problems(draw):
    """A topology of two ranks or more, a load and a placement with holes."""
    topology = draw(topologies(max_ranks_per_node=2).filter(lambda t: t.ep_size > 1))
    num_logical = draw(st.integers(1, topology.num_slots))
    load = draw(loads(num_logical))
    return topology, load, draw(placements(topology, num_logical, len(load), empty=True))


def missing_without(held, topology: Topology, ranks) -> tuple[tuple[int, int], ...]:
    """(layer, expert) that are held, but not by any rank other than these."""
    found = []
    for layer, row in enumerate(held.tolist()):
        left = {e for slot, e in enumerate(row) if slot // topology.slots_per_rank not in ranks}
        found += [(layer, expert) for expert in sorted(set(row) - left - {EMPTY})]
    return tuple(found)


@given(problems())
def test_what_is_lost_with_each_rank_and_node(problem):
    topology, _, held = problem
    survival = survivable(held, topology)
    by_rank = [missing_without(held, topology, {rank}) for rank in range(topology.ep_size)]
    nodes = np.arange(topology.ep_size).reshape(topology.num_nodes, -1)
    by_node = [missing_without(held, topology, set(node.tolist())) for node in nodes]
    assert survival.lost_with_rank == tuple(by_rank)
    assert survival.lost_with_node == tuple(by_node)
    assert survival.ranks == tuple(rank for rank, lost in enumerate(by_rank) if not lost)
    assert survival.nodes == tuple(node for node, lost in enumerate(by_node) if not lost)


@given(problems(), st.sampled_from(["rank", "node"]))
@settings(max_examples=40)
def test_a_dry_run_says_what_lose_ranks_would_do(problem, level):
    topology, load, held = problem
    if level == "node" and topology.num_nodes == 1:
        return
    size = 1 if level == "rank" else topology.ranks_per_node
    results = dry_run(held, load, topology, level=level, max_extra_moves=0)
    assert [loss.ranks for loss in results] == [
        tuple(range(first, first + size)) for first in range(0, topology.ep_size, size)
    ]
    for loss in results:
        plan = lose_ranks(held, load, topology, loss.ranks, max_extra_moves=0)
        assert loss.lost == missing_without(held, topology, set(loss.ranks))
        assert (loss.unhosted, loss.num_moves) == (plan.unhosted, plan.num_moves)
        assert loss.balancedness == pytest.approx(model_balancedness(plan.placement, load, plan.topology))
        tokens = sum(int(load[layer, expert]) for layer, expert in loss.lost)
        assert loss.lost_tokens * max(load.sum(), 1) == pytest.approx(tokens)
