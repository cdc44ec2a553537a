import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.testing import placements, topologies
from eplb_torch import ExpertWeights
from eplb_torch.reload import ExpertReload, held_experts, reload_experts


@st.composite
def cases(draw):
    topology = draw(topologies())
    num_logical = draw(st.integers(1, topology.num_slots))
    return topology, num_logical, draw(placements(topology, num_logical, empty=draw(st.booleans())))


def zeros(placement, topology):
    size = topology.slots_per_rank
    return ExpertWeights([{"a": torch.zeros(size, 2), "b": torch.zeros(size)} for _ in placement])


def rows_of(placement, num_logical):
    return [
        (layer, name, expert, torch.full(shape, 1.0 + layer * 100 + expert))
        for layer in range(len(placement))
        for name, shape in (("a", (2,)), ("b", ()))
        for expert in range(num_logical)
    ]


@given(cases(), st.data())
def test_a_stream_in_any_order_fills_every_slot_with_its_expert(case, data):
    topology, num_logical, placement = case
    rows = data.draw(st.permutations(rows_of(placement, num_logical)))
    for rank in range(topology.ep_size):
        weights = zeros(placement, topology)
        reload_experts(weights, placement, topology, rank, rows)
        for layer, tensors in enumerate(weights.layers):
            for local in range(topology.slots_per_rank):
                expert = int(placement[layer, rank * topology.slots_per_rank + local])
                expected = 0 if expert < 0 else 1.0 + layer * 100 + expert
                assert tensors["a"][local].tolist() == [expected] * 2
                assert tensors["b"][local].item() == expected


@given(cases(), st.data())
def test_what_is_missing_is_exactly_what_is_held_and_has_not_come(case, data):
    topology, num_logical, placement = case
    rank = data.draw(st.integers(0, topology.ep_size - 1))
    rows = data.draw(st.permutations(rows_of(placement, num_logical)))
    come = data.draw(st.integers(0, len(rows)))
    reload = ExpertReload(zeros(placement, topology), placement, topology, rank)
    for row in rows[:come]:
        reload.write(*row)
    own = placement[:, rank * topology.slots_per_rank : (rank + 1) * topology.slots_per_rank]
    assert reload.missing == sorted(row[:3] for row in rows[come:] if row[2] in own[row[0]])


@given(cases())
def test_held_experts_are_the_slots_of_the_rank(case):
    topology, _, placement = case
    for rank in range(topology.ep_size):
        for layer, held in enumerate(held_experts(placement, topology, rank)):
            row = placement[layer, rank * topology.slots_per_rank :][: topology.slots_per_rank].tolist()
            assert {slot: expert for expert, slots in held.items() for slot in slots} == {
                slot: expert for slot, expert in enumerate(row) if expert >= 0
            }
            assert all(list(slots) == sorted(slots) for slots in held.values())
