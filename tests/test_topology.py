"""The sizes of a group, and where they end."""

import pytest

from eplb_core import EplbError, Topology


def test_slots_and_ranks_per_node():
    topology = Topology(6, 4, num_nodes=3)
    assert (topology.num_slots, topology.ranks_per_node, topology.slots_per_node) == (24, 2, 8)
    assert Topology(6, 4).slots_per_node == 24


def test_the_largest_group_is_allowed_and_one_slot_more_is_not():
    assert Topology(2**10, 2**10).num_slots == 2**20
    with pytest.raises(EplbError, match=r"slots_per_rank=\.\.\..*1048576.*Count ranks, slots and nodes from one"):
        Topology(2**10, 2**10 + 1)


@pytest.mark.parametrize("name", ["ep_size", "slots_per_rank", "num_nodes"])
@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_are_counted_from_one(name, size):
    with pytest.raises(EplbError, match=rf"Topology\({name}=.*Count ranks, slots and nodes from one"):
        Topology(**{"ep_size": 2, "slots_per_rank": 2, name: size})


def test_nodes_must_divide_the_ranks():
    with pytest.raises(EplbError, match="ep_size=4, num_nodes=3"):
        Topology(4, 1, num_nodes=3)


def test_from_experts_names_the_next_number_of_redundant_experts_that_fits():
    assert Topology.from_experts(8, 4) == Topology(4, 2)
    assert Topology.from_experts(6, 4, num_redundant=2, num_nodes=2) == Topology(4, 2, num_nodes=2)
    assert Topology.from_experts(1, 1) == Topology(1, 1)
    with pytest.raises(EplbError, match="Use num_redundant=6"):
        Topology.from_experts(6, 4, num_redundant=3)
    for wrong in ({"num_logical": 0}, {"num_redundant": -1}, {"ep_size": 0}):
        with pytest.raises(EplbError, match=f"{next(iter(wrong))}=.*Check the model's configuration"):
            Topology.from_experts(**{"num_logical": 4, "ep_size": 2} | wrong)
