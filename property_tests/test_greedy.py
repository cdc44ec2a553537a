"""The greedy policy equals the published algorithm, on ties as well, and is a valid placement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import Topology, check_placement, rebalance, round_robin
from eplb_core.packing import pack
from eplb_core.replicate import replicate
from eplb_core.testing import (
    distinct_loads,
    loads,
    model_greedy,
    model_pack,
    model_replicate,
    placements,
    read_only,
    topologies,
)


@given(st.data(), st.integers(1, 9), st.integers(0, 12))
def test_every_further_copy_goes_to_the_expert_with_most_load_per_copy(data, num_logical, spare):
    load = data.draw(loads(num_logical)).astype(np.float64)
    expert, copies = replicate(read_only(load), num_logical + spare)
    for row, experts, counts in zip(load.tolist(), expert.tolist(), copies.tolist(), strict=True):
        assert experts == model_replicate(row, num_logical + spare)
        assert counts == [experts.count(e) for e in range(num_logical)]


@given(st.data(), st.integers(1, 9), st.integers(0, 12), st.integers(1, 4))
def test_copies_that_an_expert_has_no_use_for_go_to_the_others(data, num_logical, spare, most):
    load = data.draw(loads(num_logical)).astype(np.float64)
    expert, copies = replicate(read_only(load), num_logical + spare, max_copies=most)
    assert expert.dtype == copies.dtype == np.int32
    for row, experts, counts in zip(load.tolist(), expert.tolist(), copies.tolist(), strict=True):
        expected = [1] * num_logical
        for chosen in experts[num_logical:]:
            open_ = [e for e in range(num_logical) if expected[e] < most]
            assert chosen == max(open_, key=lambda e: (row[e] / expected[e], -e), default=0)
            expected[chosen] += 1
        assert counts == expected


@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_every_item_goes_to_the_lightest_pack_with_room(data, num_packs, room):
    load = data.draw(loads(num_packs * room)).astype(np.float64)
    packed = pack(read_only(load), num_packs)
    for row, items in zip(load.tolist(), packed.tolist(), strict=True):
        assert items == [item for items in model_pack(row, num_packs) for item in items]


@st.composite
def grouped_problems(draw):
    """A topology, a number of groups that its nodes divide, and a number of experts that fit."""
    topology = draw(topologies())
    num_groups = topology.num_nodes * draw(st.integers(1, 3))
    most = topology.num_slots // num_groups
    if most == 0:
        topology = Topology(topology.ep_size, topology.slots_per_rank * num_groups, topology.num_nodes)
        most = topology.num_slots // num_groups
    return topology, num_groups, num_groups * draw(st.integers(1, most))


@given(st.data(), grouped_problems(), st.sampled_from(["auto", "hierarchical", "global"]))
def test_greedy_is_the_published_algorithm_with_ties_to_the_lowest_index(data, problem, hierarchy):
    topology, num_groups, num_logical = problem
    load = data.draw(loads(num_logical))
    got = rebalance(load, topology, policy="greedy", num_groups=num_groups, hierarchy=hierarchy)
    sizes = (1, 1) if hierarchy == "global" else (num_groups, topology.num_nodes)
    assert got.dtype == np.int32
    assert got.tolist() == [model_greedy(row, topology, *sizes) for row in load.tolist()]
    check_placement(got, topology, num_logical)


@given(st.data(), topologies(max_nodes=3))
def test_auto_is_global_where_groups_do_not_split_over_nodes(data, topology):
    num_groups = topology.num_nodes + 1
    load = data.draw(loads(data.draw(st.integers(1, topology.num_slots))))
    if num_groups % topology.num_nodes == 0:
        return
    auto = rebalance(load, topology, policy="greedy", num_groups=num_groups)
    forced = rebalance(load, topology, policy="greedy", hierarchy="global")
    assert auto.tolist() == forced.tolist()


@given(st.data(), grouped_problems())
def test_hierarchical_keeps_all_copies_of_a_group_on_one_node(data, problem):
    topology, num_groups, num_logical = problem
    load = data.draw(distinct_loads(num_logical, num_layers=2))
    got = rebalance(load, topology, policy="greedy", num_groups=num_groups, hierarchy="hierarchical")
    group = got // (num_logical // num_groups)
    node = np.arange(topology.num_slots) // topology.slots_per_node
    for layer in range(2):
        for g in range(num_groups):
            assert len(set(node[group[layer] == g].tolist())) == 1


@given(st.data(), topologies())
def test_windows_are_summed(data, topology):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    windows = data.draw(loads(num_logical, num_windows=3))
    summed = rebalance(windows.sum(axis=0), topology, policy="greedy")
    assert rebalance(windows, topology, policy="greedy").tolist() == summed.tolist()


@given(st.data(), topologies())
def test_with_previous_the_experts_of_each_rank_are_the_same(data, topology):
    num_logical = data.draw(st.integers(1, topology.num_slots))
    load = data.draw(loads(num_logical))
    previous = data.draw(placements(topology, num_logical, len(load)))
    free = rebalance(load, topology, policy="greedy").reshape(-1, topology.slots_per_rank)
    kept = rebalance(load, topology, policy="greedy", previous=previous).reshape(-1, topology.slots_per_rank)
    assert np.sort(free, axis=1).tolist() == np.sort(kept, axis=1).tolist()


@pytest.mark.parametrize("ep_size", [1, 2, 300])
def test_sizes_from_one_rank_to_hundreds(ep_size):
    topology = Topology(ep_size, slots_per_rank=3)
    num_logical = max(ep_size * 2, 1)
    load = np.random.default_rng(0).integers(1, 10**6, (2, num_logical))
    got = rebalance(load, topology, policy="greedy", previous=round_robin(2, num_logical, topology))
    check_placement(got, topology, num_logical)
