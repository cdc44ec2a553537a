"""The controller's gates and reasons, one at a time."""

from functools import partial

import numpy as np
import pytest

from eplb_core import EplbError, Topology, control, rebalance, round_robin
from eplb_core.control import ControlConfig, ModelConfig, Reason
from eplb_core.costs import Costs, Links

TOPOLOGY = Topology(ep_size=2, slots_per_rank=3)
EVEN = np.full((3, 4), 25)
SKEWED = np.asarray([[90, 2, 4, 4]] * 3)
FREE = Links(within_node=float("inf"), across_nodes=float("inf"), latency=0.0)


def begin(interval=10, placement=None, model=None, **options):
    config = ControlConfig({"main": model or ModelConfig(TOPOLOGY, 4)}, interval=interval, **options)
    if placement is None:
        placement = np.asarray([[0, 1, 2, 3, 1, 2]] * 3)
    return config, control.init(config, {"main": placement})


def after_load(load, **options):
    config, state = begin(**options)
    state = control.observe(config, state, {"main": load}, steps=state.next_step)
    return config, state, control.decide(config, state)["main"]


def test_the_first_decision_is_due_after_a_quarter_of_the_interval():
    config, state = begin(interval=10)
    assert not control.due(control.observe(config, state, steps=1))
    assert control.due(control.observe(config, state, steps=2))
    config, state = begin(interval=10, first=7)
    assert not control.due(control.observe(config, state, steps=6))


def test_a_balanced_placement_is_left_alone():
    config, state = begin(placement=np.asarray([[0, 1, 0, 2, 3, 2]] * 3))
    state = control.observe(config, state, {"main": EVEN}, steps=2)
    decision = control.decide(config, state)["main"]
    assert decision.reason is Reason.BALANCED
    assert decision.balancedness == 1.0
    assert decision.placement is None


def test_without_load_nothing_is_done():
    config, state = begin()
    decision = control.decide(config, control.observe(config, state, steps=100))["main"]
    assert decision.reason is Reason.BALANCED


def test_a_decision_to_rebalance_carries_its_numbers():
    costs = Costs(bytes_per_expert=100, seconds_per_token=1.0, links=Links(1.0, 1.0, 0.0))
    model = ModelConfig(TOPOLOGY, 4, costs=costs)
    _, state, decision = after_load(SKEWED, model=model, horizon=1000, window=10)
    assert decision.reason is Reason.REBALANCE
    assert decision.predicted_balancedness > decision.balancedness
    assert decision.bytes_moved == 100 * decision.moved_experts > 0
    before = control.compare(state.models["main"].placement, decision.placement, SKEWED, TOPOLOGY)
    assert decision.saved_seconds == pytest.approx(100 * float((before.busiest_before - before.busiest_after).sum()))
    assert 0 < decision.cost_seconds < decision.saved_seconds


def test_hysteresis_waits_for_a_deeper_fall_and_then_acts_up_to_the_threshold():
    config, state = begin(interval=1, threshold=0.9, hysteresis=0.3, placement=np.asarray([[0, 1, 0, 2, 3, 2]] * 3))

    def reason(state, load):
        state = control.observe(config, state, {"main": load})
        decisions = control.decide(config, state)
        return control.adopt(config, state, decisions), decisions["main"].reason

    slight, deep = np.asarray([[30, 30, 20, 20]] * 3), np.asarray([[50, 50, 0, 0]] * 3)
    state, first = reason(state, slight)  # balancedness 0.83: below 0.9, not below 0.6
    assert first is Reason.BALANCED
    state, second = reason(state, deep)
    assert second is Reason.REBALANCE
    state = control.abandon(config, state, "main")
    state = control.observe(config, state)
    state, third = reason(state, slight)  # still acting: 0.83 is below 0.9
    assert third is Reason.REBALANCE
    state = control.observe(config, control.abandon(config, state, "main"))
    state, fourth = reason(state, EVEN)
    assert fourth is Reason.BALANCED
    state, fifth = reason(state, slight)  # came back to the threshold: acting has ended
    assert fifth is Reason.BALANCED


def test_a_gain_below_the_least_is_not_worth_it():
    assert after_load(SKEWED, min_gain=0.1)[2].reason is Reason.REBALANCE
    decision = after_load(SKEWED, min_gain=0.99)[2]
    assert decision.reason is Reason.NOT_WORTH_IT
    assert decision.placement is None
    assert decision.predicted_balancedness > decision.balancedness


def test_moves_that_cost_more_time_than_they_save_are_not_worth_it():
    dear = Costs(bytes_per_expert=10**6, seconds_per_token=1e-3, links=Links(1e3, 1e3, 0.0))
    decision = after_load(SKEWED, model=ModelConfig(TOPOLOGY, 4, costs=dear))[2]
    assert decision.reason is Reason.NOT_WORTH_IT
    cheap = Costs(bytes_per_expert=1, seconds_per_token=1e-3, links=Links(1e3, 1e3, 0.0))
    assert after_load(SKEWED, model=ModelConfig(TOPOLOGY, 4, costs=cheap))[2].reason is Reason.REBALANCE


def test_a_return_equal_to_the_least_is_enough():
    costs = Costs(bytes_per_expert=0, seconds_per_token=0.0, links=FREE)
    assert after_load(SKEWED, model=ModelConfig(TOPOLOGY, 4, costs=costs))[2].reason is not Reason.REBALANCE
    _, state, decision = after_load(
        SKEWED,
        model=ModelConfig(TOPOLOGY, 4, costs=Costs(100, 1.0, links=Links(1.0, 1.0, 0.0))),
        horizon=1000,
        window=1,
    )
    exact = decision.saved_seconds / decision.cost_seconds
    costs = Costs(100, 1.0, links=Links(1.0, 1.0, 0.0))
    options = {"model": ModelConfig(TOPOLOGY, 4, costs=costs), "horizon": 1000, "window": 1}
    assert after_load(SKEWED, min_return=exact * 0.999, **options)[2].reason is Reason.REBALANCE
    assert after_load(SKEWED, min_return=exact * 1.01, **options)[2].reason is Reason.NOT_WORTH_IT


def test_a_layer_that_gains_nothing_keeps_its_placement_though_moving_is_free():
    def shuffle(load, topology, *, previous):
        new = np.asarray(rebalance(load, topology, previous=previous)).copy()
        new[1] = previous[1][::-1]
        return new

    costs = Costs(bytes_per_expert=0, seconds_per_token=1.0, links=FREE)
    load = np.asarray([SKEWED[0], [25, 25, 25, 25], SKEWED[0]])
    _, state, decision = after_load(load, model=ModelConfig(TOPOLOGY, 4, planner=shuffle, costs=costs))
    assert decision.reason is Reason.REBALANCE
    np.testing.assert_array_equal(decision.placement[1], state.models["main"].placement[1])
    assert (decision.placement[0] != state.models["main"].placement[0]).any()


def test_measured_seconds_correct_the_price_of_the_next_moves():
    costs = Costs(bytes_per_expert=100, seconds_per_token=1.0, links=Links(1.0, 1.0, 0.0))
    options = {"model": ModelConfig(TOPOLOGY, 4, costs=costs), "horizon": 10**6, "interval": 4}
    config, state, decision = after_load(SKEWED, **options)
    state = control.adopt(config, state, {"main": decision})
    state = control.commit(config, state, "main")
    for _ in range(2):  # the second time there is nothing left to measure
        state = control.measure(config, state, "main", 3 * decision.cost_seconds)
    assert state.models["main"].slowness == pytest.approx(2.0)  # half of what was believed, half of what was seen
    state = control.observe(config, state, {"main": SKEWED[:, ::-1].copy()}, steps=4)
    dearer = control.decide(config, state)["main"]
    forgetful = state.models["main"]._replace(slowness=1.0)
    cheaper = control.decide(config, state._replace(models={"main": forgetful}))["main"]
    assert dearer.cost_seconds == pytest.approx(2 * cheaper.cost_seconds)


def test_slot_counts_are_credited_with_the_placement_of_their_own_epoch():
    config, state = begin(interval=1, model=ModelConfig(TOPOLOGY, 4, planner=partial(rebalance, policy="greedy")))
    state = control.observe(config, state, {"main": SKEWED})
    state = control.adopt(config, state, control.decide(config, state))
    old, new = state.models["main"].placement, state.models["main"].target
    state = control.commit(config, state, "main", [1])
    counts = np.arange(1, 19).reshape(3, 6)
    late = control.observe(config, state, {"main": counts}, epochs={"main": 0})
    now = control.observe(config, state, {"main": counts}, epochs={"main": 1})
    mixed = old.copy()
    mixed[1] = new[1]
    for observed, placement in ((late, old), (now, mixed)):
        expected = np.zeros((3, 4), dtype=int)
        for at, expert in np.ndenumerate(placement):
            expected[at[0], expert] += counts[at]
        np.testing.assert_array_equal(config.models["main"].estimator.estimate(observed.models["main"].load), expected)
    assert not np.array_equal(old[1], new[1])


def test_an_epoch_that_is_forgotten_or_to_come_is_refused(monkeypatch):
    monkeypatch.setattr("eplb_core.control.state.HISTORY", 6)
    flip = ModelConfig(TOPOLOGY, 4, planner=lambda load, topology, *, previous: previous[:, ::-1])
    config, state = begin(interval=1, model=flip, placement=np.asarray([[0, 1, 0, 2, 3, 3]] * 3))
    for load in [SKEWED, SKEWED[:, ::-1].copy()] * 3:
        state = control.observe(config, state, {"main": load})
        target = control.Decision(Reason.REBALANCE, placement=state.models["main"].placement[:, ::-1].copy())
        state = control.commit(config, control.adopt(config, state, {"main": target}), "main")
    model = state.models["main"]
    assert model.epoch == 6
    np.testing.assert_array_equal(control.placement_at(model, 4), model.placement)
    with pytest.raises(EplbError, match=r"must be one of 4\.\.6; got epoch=3"):
        control.placement_at(model, 3)
    with pytest.raises(EplbError, match="epoch=7"):
        control.observe(config, state, {"main": np.ones((3, 6), dtype=int)}, epochs={"main": 7})


def test_a_layer_between_old_and_target_is_committed_as_it_is_held():
    config, state, decision = after_load(
        SKEWED, model=ModelConfig(TOPOLOGY, 4, planner=partial(rebalance, policy="greedy"))
    )
    state = control.adopt(config, state, {"main": decision})
    held = state.models["main"].placement.copy()
    held[0, 0], held[0, 4] = held[0, 4], held[0, 0]
    state = control.commit(config, state, "main", [0], placement=held)
    np.testing.assert_array_equal(state.models["main"].placement, held)
    assert state.models["main"].target is not None
    state = control.commit(config, state, "main")
    np.testing.assert_array_equal(state.models["main"].placement, decision.placement)
    assert state.models["main"].target is None


def test_a_placement_without_some_expert_is_replaced_whatever_the_gates_say():
    config, state = begin(min_gain=0.9, threshold=0.1)
    lost = np.asarray([[0, 1, 0, 2, 2, -1]] * 3)
    model = state.models["main"]._replace(placement=lost)
    state = control.observe(config, state._replace(models={"main": model}), {"main": EVEN}, steps=2)
    decision = control.decide(config, state)["main"]
    assert decision.reason is Reason.REBALANCE
    assert all(set(range(4)) <= set(row) for row in decision.placement.tolist())


def test_values_are_read_only_and_inputs_are_kept():
    config, state = begin()
    with pytest.raises(ValueError, match="read-only"):
        state.models["main"].placement[0, 0] = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, r"interval=...\)` must be an integer >= 1"),
        ({"first": 0}, "first"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 0.5, "hysteresis": 0.6}, "hysteresis"),
        ({"min_gain": -0.1}, "min_gain"),
        ({"min_return": -1.0}, "min_return"),
        ({"horizon": 0}, "horizon"),
        ({"window": 0}, "window"),
    ],
)
def test_figures_out_of_range_are_refused(options, message):
    with pytest.raises(EplbError, match=message):
        begin(**options)


def test_requests_that_cannot_be_met_are_refused():
    config, state = begin()
    with pytest.raises(EplbError, match="must name a model"):
        ControlConfig({})
    with pytest.raises(EplbError, match="exactly the configured models"):
        control.init(config, {"draft": round_robin(3, 4, TOPOLOGY)})
    with pytest.raises(EplbError, match="needs a slot for every expert"):
        control.init(config, {"main": np.zeros((3, 6), dtype=int)})
    with pytest.raises(EplbError, match="configured models"):
        control.observe(config, state, {"draft": EVEN})
    with pytest.raises(EplbError, match="must have the shape"):
        control.observe(config, state, {"main": EVEN[:1]})
    with pytest.raises(EplbError, match="steps"):
        control.observe(config, state, steps=-1)
    with pytest.raises(EplbError, match="seconds"):
        control.measure(config, state, "main", float("nan"))
    with pytest.raises(EplbError, match="nothing under way"):
        control.commit(config, state, "main")
    with pytest.raises(EplbError, match="nothing under way"):
        control.abandon(config, state, "main")
    target = control.Decision(Reason.REBALANCE, placement=round_robin(3, 4, TOPOLOGY)[:, ::-1])
    moving = control.adopt(config, state, {"main": target})
    with pytest.raises(EplbError, match="must wait"):
        control.adopt(config, moving, {"main": target})
    with pytest.raises(EplbError, match=r"layers 0\.\.2; got layers=\[3\]"):
        control.commit(config, moving, "main", [3])
    with pytest.raises(EplbError, match="needs a slot for every expert"):
        control.adopt(config, state, {"main": target._replace(placement=np.zeros((3, 6), dtype=int))})
