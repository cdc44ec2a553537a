"""Replays mean what their docstrings say, for any trace, topology and configuration."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import rebalance, round_robin
from eplb_core.control import Reason
from eplb_core.costs import Costs, Links, migration_cost
from eplb_core.plots.style import spread
from eplb_core.simulate import balancedness_bound, replay_trace
from eplb_core.simulate.configuration import Configuration
from eplb_core.simulate.replay import gain, summarize
from eplb_core.testing import loads, model_moved, model_rank_load, placement_pairs, topologies

COSTS = Costs(bytes_per_expert=7, seconds_per_token=0.25, links=Links(5.0, 2.0, 0.125))
POLICIES = st.sampled_from(["greedy", "refined", "incremental"])
INTERVALS = st.one_of(st.none(), st.integers(1, 4))


@st.composite
def traces(draw):
    """A topology and a read-only trace of two to five windows that fits it."""
    topology = draw(topologies())
    num_logical = draw(st.integers(1, topology.num_slots))
    return topology, draw(loads(num_logical, num_layers=draw(st.integers(1, 3)), num_windows=draw(st.integers(2, 5))))


def balancedness_of(placement, tokens, topology):
    ranks = model_rank_load(placement.tolist(), tokens.tolist(), topology)
    return sum(ranks) / len(ranks) / max(ranks) if max(ranks) > 0 else 1.0


@given(traces(), POLICIES, INTERVALS)
def test_every_window_is_judged_under_the_plan_made_before_it(given_trace, policy, interval):
    topology, load = given_trace
    replay = replay_trace(load, Configuration(topology, policy, interval=interval), COSTS)
    held, moved = round_robin(*load.shape[1:], topology), 0
    for window in range(len(load) - 1):
        if window == 0 if interval is None else window % interval == 0:
            new = rebalance(load[window], topology, policy=policy, previous=held)
            moved += sum(len(model_moved(a, b, topology)) for a, b in zip(held.tolist(), new.tolist(), strict=True))
            held = new
        expected = [balancedness_of(*pair, topology) for pair in zip(held, load[window + 1], strict=True)]
        assert replay.balancedness[window].tolist() == pytest.approx(expected)
    assert (replay.moved_experts, replay.bytes_moved) == (moved, moved * 7)
    np.testing.assert_array_equal(replay.placements[-1], held)


@given(placement_pairs())
def test_a_migration_is_counted_message_by_message(pair):
    topology, _, old, new = pair
    cost = migration_cost(old, new, topology, COSTS)
    received = [model_moved(*row, topology) for row in zip(old.tolist(), new.tolist(), strict=True)]
    per_rank = np.bincount([rank for row in received for rank, _ in row], minlength=topology.ep_size)
    assert cost.moved_experts == sum(map(len, received))
    assert cost.bytes_moved == 7 * cost.moved_experts
    assert cost.bytes_across_nodes <= (cost.bytes_moved if topology.num_nodes > 1 else 0)
    waiting = cost.rounds * 0.125
    assert per_rank.max() * 7 / 5 <= cost.seconds - waiting + 1e-9 <= cost.moved_experts * 7 / 2 + 2e-9
    if topology.num_nodes == 1:
        assert cost.seconds - waiting <= cost.moved_experts * 7 / 5 + 1e-9
    assert (cost.rounds == 0) is (cost.moved_experts == 0)


@given(traces(), POLICIES, INTERVALS)
def test_amortised_time_adds_up_to_the_critical_path(given_trace, policy, interval):
    topology, load = given_trace
    replay = replay_trace(load, Configuration(topology, policy, interval=interval), COSTS)
    assert replay.amortised_seconds.sum() == pytest.approx(replay.critical_path_seconds.sum())
    assert (replay.amortised_seconds >= replay.serving_seconds - 1e-9).all()
    assert replay.migration_seconds.sum() == pytest.approx(sum(event.migration.seconds for event in replay.events))
    assert replay.serving_seconds == pytest.approx(replay.busiest_load.sum(axis=1) * 0.25)


@given(traces(), POLICIES, st.floats(0.1, 1.0), st.floats(0, 0.3), st.one_of(st.none(), st.integers(1, 3)))
def test_gates_carry_out_only_what_helps(given_trace, policy, threshold, min_gain, horizon):
    topology, load = given_trace
    gates: dict[str, Any] = {"threshold": threshold, "min_gain": min_gain, "horizon": horizon}
    replay = replay_trace(load, Configuration(topology, policy, **gates), COSTS)
    assert len(replay.placements) == 1 + len(replay.rebalances)
    for event in replay.events:
        decision = event.decision
        if decision.reason is Reason.REBALANCE:
            assert decision.balancedness < threshold
            assert decision.predicted_balancedness > decision.balancedness
        else:
            assert event.migration.moved_experts == 0
        if decision.reason is Reason.BALANCED and decision.balancedness >= threshold:
            assert event.planning_seconds == 0
        if horizon is not None and decision.reason is Reason.REBALANCE:
            assert decision.saved_seconds >= decision.cost_seconds - 1e-9


@given(traces(), POLICIES)
def test_no_replay_exceeds_the_bound(given_trace, policy):
    topology, load = given_trace
    replay = replay_trace(load, Configuration(topology, policy), COSTS)
    bound = balancedness_bound(load, topology)
    assert (replay.balancedness <= bound * (1 + 1e-6)).all()
    assert ((bound > 0) & (bound <= 1 + 1e-9)).all()


@given(traces(), POLICIES, st.integers(1, 100))
def test_gain_does_not_depend_on_the_unit_of_time(given_trace, policy, factor):
    topology, load = given_trace
    found = []
    for unit in (1, factor):
        costs = Costs(7, 0.25 * unit, links=Links(5 / unit, 2 / unit, 0.125 * unit))
        static, moving = (replay_trace(load, Configuration(topology, name), costs) for name in ("static", policy))
        found.append(gain(moving, static).share)
        assert summarize(moving, static)["gain"]["share"] == found[-1]
    assert found[0] == pytest.approx(found[1])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.1, 2))
def test_labels_keep_apart_in_their_order(positions, gap):
    placed = spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    steps = np.diff([placed[index] for index in order])
    assert (steps >= gap - 1e-9).all()
    if (np.diff(sorted(positions)) >= gap).all():
        assert placed == pytest.approx(positions)
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)
