"""Load per rank, balancedness and moved experts mean what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, balancedness, model_balancedness, moved_experts, plan_moves, rank_load
from eplb_core.metrics import received_experts
from eplb_core.testing import loads, model_moved, model_rank_load, placement_pairs


@given(st.data(), placement_pairs(empty=True))
def test_copies_share_the_load_equally(data, pair):
    topology, num_logical, _, placement = pair
    load = data.draw(loads(num_logical, num_layers=len(placement)))
    got = rank_load(placement, load, topology)
    for row, tokens, ranks in zip(placement.tolist(), load.tolist(), got.tolist(), strict=True):
        assert ranks == pytest.approx(model_rank_load(row, tokens, topology))


@given(st.data(), placement_pairs())
def test_balancedness_is_mean_over_max(data, pair):
    topology, num_logical, _, placement = pair
    load = data.draw(loads(num_logical, num_layers=len(placement)))
    got = balancedness(placement, load, topology)
    means, maxima = 0.0, 0.0
    for row, tokens, value in zip(placement.tolist(), load.tolist(), got.tolist(), strict=True):
        ranks = model_rank_load(row, tokens, topology)
        means, maxima = means + sum(ranks) / len(ranks), maxima + max(ranks)
        assert value == pytest.approx(sum(ranks) / len(ranks) / max(ranks) if max(ranks) else 1.0)
        assert 0 < value <= 1 + 1e-12
    total = float(model_balancedness(placement, load, topology))
    assert total == pytest.approx(means / maxima if maxima else 1.0)


@given(st.data(), placement_pairs())
def test_windows_are_judged_one_by_one(data, pair):
    topology, num_logical, _, placement = pair
    load = data.draw(loads(num_logical, num_layers=len(placement), num_windows=3))
    for metric in (rank_load, balancedness, model_balancedness):
        got = metric(placement, load, topology)
        expected = [metric(placement, window, topology) for window in load]
        np.testing.assert_allclose(got, np.stack(expected))


@given(placement_pairs(empty=True))
def test_moved_experts_counts_what_ranks_must_receive(pair):
    topology, _, old, new = pair
    got = moved_experts(old, new, topology)
    assert got.dtype == np.int32
    rows = zip(old.tolist(), new.tolist(), strict=True)
    assert got.tolist() == [len(model_moved(*row, topology)) for row in rows]


@given(placement_pairs(), st.sampled_from(["direct", "node"]))
def test_received_experts_are_the_moved_ones_told_apart_by_where_they_come_from(pair, fan_out):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    within, across = received_experts(plan, topology)
    np.testing.assert_array_equal(within + across, moved_experts(old, new, topology))
    assert within.dtype == across.dtype == np.int32
    for layer, row in enumerate(plan.source_slot.tolist()):
        relays = [EMPTY] * len(row) if plan.relay_slot is None else plan.relay_slot[layer].tolist()
        received = {}
        for dst, (src, via) in enumerate(zip(row, relays, strict=True)):
            if src != EMPTY and src // topology.slots_per_rank != dst // topology.slots_per_rank:
                received.setdefault((dst // topology.slots_per_rank, src), src if via == EMPTY else via)
        nodes = [(rank, slot // topology.slots_per_rank) for (rank, _), slot in received.items()]
        crossing = [1 for a, b in nodes if a // topology.ranks_per_node != b // topology.ranks_per_node]
        assert across[layer] == len(crossing)
