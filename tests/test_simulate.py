"""Replays: what is planned when, what is judged under which placement, and what it is said to cost."""

import multiprocessing
import os
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from eplb_core import EplbError, Topology, rebalance, round_robin
from eplb_core.control import Reason
from eplb_core.costs import Costs, Links, migration_cost
from eplb_core.simulate import balancedness_bound, simulate
from eplb_core.simulate.bootstrap import joint_intervals, mean_interval, resample_weights
from eplb_core.simulate.configuration import Configuration, grid, parse_estimator
from eplb_core.simulate.replay import gain, summarize
from eplb_core.simulate.sweep import SimulationError, sweep
from eplb_core.testing import model_moved, model_rank_load

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3, num_nodes=2)
SHAPE = (9, 2, 10)  # windows, layers, experts
FREE = Costs(bytes_per_expert=100, seconds_per_token=0.5, links=Links(1000.0, 100.0, 0.25))


def trace(seed=0, shape=SHAPE, drift=0.3):
    """Skewed loads that drift from window to window."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=shape[1:])
    windows = []
    for _ in range(shape[0]):
        level = level + drift * rng.normal(size=level.shape)
        windows.append(rng.poisson(300 * np.exp(level)))
    return np.stack(windows)


def plain_replay(load, topology, plan, due):
    """The definition, window by window and layer by layer: (balancedness of each, moved experts)."""
    held = round_robin(*load.shape[1:], topology)
    moved, judged = 0, []
    for window in range(len(load) - 1):
        if due(window):
            new = plan(load[: window + 1], held)
            moved += sum(len(model_moved(a, b, topology)) for a, b in zip(held.tolist(), new.tolist(), strict=True))
            held = new
        row = []
        for placement, tokens in zip(held.tolist(), load[window + 1].tolist(), strict=True):
            ranks = model_rank_load(placement, tokens, topology)
            row.append(sum(ranks) / len(ranks) / max(ranks))
        judged.append(row)
    return judged, moved


def last_window(policy):
    return lambda seen, held: rebalance(seen[-1], TOPOLOGY, policy=policy, previous=held)


@pytest.mark.parametrize("policy", ["greedy", "refined", "incremental"])
@pytest.mark.parametrize("interval", [1, 2, 3, 8, 100])
def test_a_replay_is_what_its_definition_says(policy, interval):
    load = trace()
    judged, moved = plain_replay(load, TOPOLOGY, last_window(policy), lambda window: window % interval == 0)
    replay = simulate(load, TOPOLOGY, policy=policy, interval=interval, costs=FREE)
    np.testing.assert_allclose(replay.balancedness, judged)
    assert replay.mean_balancedness == pytest.approx(np.mean(judged))
    assert replay.moved_experts == moved > 0
    assert replay.bytes_moved == moved * 100
    assert [event.window for event in replay.events] == list(range(0, 8, interval))


def test_once_plans_on_the_first_window_only():
    load = trace()
    judged, moved = plain_replay(load, TOPOLOGY, last_window("refined"), lambda window: window == 0)
    replay = simulate(load, TOPOLOGY, policy="refined", interval=None)
    np.testing.assert_allclose(replay.balancedness, judged)
    assert replay.moved_experts == moved
    assert len(replay.events) == 1


def test_static_never_plans():
    load = trace()
    judged, _ = plain_replay(load, TOPOLOGY, last_window("greedy"), lambda window: False)
    replay = simulate(load, TOPOLOGY, policy="static")
    np.testing.assert_allclose(replay.balancedness, judged)
    assert (replay.moved_experts, replay.events, len(replay.placements)) == (0, (), 1)
    assert replay.planning_seconds == 0


@pytest.mark.parametrize(
    ("spec", "estimate"),
    [
        ("last", lambda seen: seen[-1]),
        ("window:3", lambda seen: seen[-3:].sum(axis=0)),
        ("window:1", lambda seen: seen[-1]),
        ("decay:2", lambda seen: sum(w * 0.5 ** (age / 2) for age, w in enumerate(seen[::-1]))),
        ("trend:2", lambda seen: np.maximum(2 * seen[-1] - seen[-2], 0) if len(seen) > 1 else seen[-1]),
    ],
)
def test_the_estimator_sees_all_windows_so_far_and_none_to_come(spec, estimate):
    load = trace(drift=0.8)

    def plan(seen, held):
        return rebalance(np.asarray(estimate(seen)), TOPOLOGY, policy="greedy", previous=held)

    judged, moved = plain_replay(load, TOPOLOGY, plan, lambda window: window % 2 == 0)
    replay = simulate(load, TOPOLOGY, policy="greedy", estimator=spec, interval=2)
    np.testing.assert_allclose(replay.balancedness, judged)
    assert replay.moved_experts == moved


def test_a_window_to_come_changes_nothing_before_it():
    load, other = trace(), trace()
    other[5:] = other[5:, :, ::-1]
    kept = [simulate(x, TOPOLOGY).balancedness[:4] for x in (load, other)]
    np.testing.assert_array_equal(*kept)


def test_an_even_start_ignores_the_traffic():
    load = trace()
    starts = [simulate(x, TOPOLOGY, policy="static", start="even").placements for x in (load, load[:, :, ::-1])]
    np.testing.assert_array_equal(*starts)
    uniform = np.full((3, 2, 10), 60)
    even = simulate(uniform, TOPOLOGY, policy="static", start="even").mean_balancedness
    assert even > simulate(uniform, TOPOLOGY, policy="static").mean_balancedness


def rotate(load, topology, previous, by=1):
    """A policy of a user's own: turn the slots."""
    return np.roll(np.asarray(previous), by, axis=1)


def test_a_policy_may_be_a_function():
    replay = simulate(trace(), TOPOLOGY, policy=rotate, options={"by": 3})
    for turns, placement in enumerate(replay.placements):
        np.testing.assert_array_equal(placement, np.roll(replay.placements[0], 3 * turns, axis=1))
    assert len(replay.placements) == 9
    assert replay.configuration.label == "rotate, by=3"


def test_a_policy_that_loses_an_expert_is_refused():
    def forget(load, topology, previous):
        return np.zeros_like(previous)

    with pytest.raises(EplbError, match="needs a slot for every expert"):
        simulate(trace(), TOPOLOGY, policy=forget)


def test_options_reach_the_policy():
    replay = simulate(trace(), TOPOLOGY, options={"max_moves": 1})
    assert all(0 < event.migration.moved_experts <= 2 for event in replay.events[:2])


def test_gates_are_those_of_the_controller():
    load = trace(drift=0.05)
    free = simulate(load, TOPOLOGY, policy="refined")
    level = free.events[0].decision.predicted_balancedness
    gated = simulate(load, TOPOLOGY, policy="refined", threshold=level - 0.02)
    reasons = [event.decision.reason for event in gated.events]
    assert reasons[0] is Reason.REBALANCE
    assert Reason.BALANCED in reasons
    assert gated.moved_experts < free.moved_experts
    assert len(gated.placements) == 1 + reasons.count(Reason.REBALANCE)


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e-6, Reason.NOT_WORTH_IT), (1e6, Reason.REBALANCE)], ids=["dear", "cheap"]
)
def test_a_plan_must_pay_for_itself_within_the_horizon(scale, reason):
    costs = Costs(bytes_per_expert=1000, scale=scale)
    replay = simulate(trace(), TOPOLOGY, policy="refined", interval=None, horizon=1, costs=costs)
    assert replay.events[0].decision.reason is reason
    assert (replay.moved_experts > 0) is (reason is Reason.REBALANCE)
    assert replay.events[0].planning_seconds > 0


def test_horizon_and_return_weigh_savings_against_moves():
    load = trace()
    (event,) = simulate(load, TOPOLOGY, policy="refined", interval=None, horizon=1, min_return=0.0, costs=FREE).events
    ratio = event.decision.saved_seconds / event.decision.cost_seconds  # within one window, of the whole plan
    costs = replace(FREE, scale=1 / ratio)  # one window pays for the plan exactly

    def carried_out(**gates):
        replay = simulate(load, TOPOLOGY, policy="refined", interval=None, costs=costs, **gates)
        return replay.moved_experts

    everything = carried_out(horizon=100)
    assert everything == event.migration.moved_experts
    assert carried_out(horizon=100, min_return=1000.0) == 0
    assert carried_out(horizon=100_000, min_return=1000.0) == everything
    assert carried_out(horizon=1, min_return=50.0) == 0


def test_hysteresis_waits_until_balance_has_fallen_by_it():
    load = trace(drift=0.6)
    seen = [event.decision.balancedness for event in simulate(load, TOPOLOGY, threshold=1e-9).events]
    level, lowest = max(seen) + 0.01, min(seen)
    assert simulate(load, TOPOLOGY, threshold=level).moved_experts > 0
    assert simulate(load, TOPOLOGY, threshold=level, hysteresis=level - lowest + 0.01).moved_experts == 0


def test_a_gate_that_lets_everything_through_changes_nothing_but_needless_plans():
    load = trace(drift=1.0)
    plain, gated = simulate(load, TOPOLOGY, interval=2), simulate(load, TOPOLOGY, interval=2, threshold=1.0)
    np.testing.assert_allclose(plain.balancedness, gated.balancedness)
    assert [e.window for e in plain.events] == [e.window for e in gated.events]


def test_migration_takes_as_long_as_the_busiest_rank():
    old = np.asarray([[0, 1, 2, 3, 4, 5, 6, 7]])
    topology = Topology(ep_size=4, slots_per_rank=2, num_nodes=2)
    # Rank 0 receives 2 from rank 1 (its node) and 6 from rank 3 (across); rank 2 receives 6 from rank 3.
    new = np.asarray([[2, 6, 2, 3, 4, 6, 6, 7]])
    cost = migration_cost(old, new, topology, Costs(bytes_per_expert=600, links=Links(300.0, 100.0, 0.5)))
    assert cost == (3, 1800, 600, 2, 8 + 2 * 0.5)  # rank 0: 2 s within and 6 s across; rank 3 sends as long


def test_sending_may_take_longer_than_receiving():
    old, new = np.asarray([[0, 1, 2, 3, 4, 5, 6, 7]]), np.asarray([[0, 1, 2, 0, 4, 0, 6, 1]])
    cost = migration_cost(old, new, Topology(ep_size=4, slots_per_rank=2), Costs(600, links=Links(300.0, 100.0, 0.0)))
    assert cost == (3, 1800, 0, 3, 6.0)  # rank 0 sends to each of the others


def test_a_slot_that_moves_within_its_rank_costs_nothing():
    old, new = np.asarray([[0, 1, 2, 3]]), np.asarray([[1, 0, 3, 2]])
    assert migration_cost(old, new, Topology(2, 2), Costs()) == (0, 0, 0, 0, 0.0)


def test_the_critical_path_is_serving_and_moving():
    load = trace()
    replay = simulate(load, TOPOLOGY, costs=FREE, interval=3)
    busiest = []
    for window in range(8):
        placed = zip(replay.placements[1 + window // 3].tolist(), load[window + 1].tolist(), strict=True)
        busiest.append(sum(max(model_rank_load(row, tokens, TOPOLOGY)) for row, tokens in placed))
    np.testing.assert_allclose(replay.serving_seconds, np.asarray(busiest) * 0.5)
    moving = [event.migration.seconds for event in replay.events]
    np.testing.assert_allclose(replay.migration_seconds[[0, 3, 6]], moving)
    assert replay.migration_seconds.sum() == pytest.approx(sum(moving))
    np.testing.assert_allclose(replay.critical_path_seconds, replay.serving_seconds + replay.migration_seconds)
    assert replay.amortised_seconds.sum() == pytest.approx(replay.critical_path_seconds.sum())
    np.testing.assert_allclose((replay.amortised_seconds - replay.serving_seconds)[:3], moving[0] / 3)
    np.testing.assert_allclose((replay.amortised_seconds - replay.serving_seconds)[6:], moving[2] / 2)


def test_overlapped_moves_take_no_time():
    replay = simulate(trace(), TOPOLOGY, costs=Costs(overlapped=True))
    assert replay.migration_seconds.sum() > 0
    np.testing.assert_array_equal(replay.critical_path_seconds, replay.serving_seconds)
    np.testing.assert_array_equal(replay.amortised_seconds, replay.serving_seconds)


def test_scale_multiplies_serving_and_not_moving():
    once, tenfold = (simulate(trace(), TOPOLOGY, costs=Costs(scale=scale)) for scale in (1.0, 10.0))
    np.testing.assert_allclose(tenfold.serving_seconds, 10 * once.serving_seconds)
    np.testing.assert_array_equal(tenfold.migration_seconds, once.migration_seconds)


def test_gain_is_the_share_of_seconds_saved():
    load = trace(shape=(40, 2, 10))
    static, replay = (simulate(load, TOPOLOGY, policy=policy, costs=FREE) for policy in ("static", "refined"))
    saved = gain(replay, static)
    assert saved.share == pytest.approx(1 - replay.critical_path_seconds.sum() / static.critical_path_seconds.sum())
    assert saved.low < saved.share < saved.high
    assert gain(static, static) == (0, 0, 0)


def test_the_bound_is_above_every_replay():
    load = trace()
    bound = balancedness_bound(load, TOPOLOGY)
    assert bound.shape == (8, 2)
    assert (simulate(load, TOPOLOGY, policy="refined").balancedness <= bound + 1e-9).all()


def test_nothing_served_is_balanced_and_takes_no_time():
    replay = simulate(np.zeros((3, 2, 10), dtype=int), TOPOLOGY)
    assert replay.mean_balancedness == 1
    assert replay.serving_seconds.sum() == 0
    assert gain(replay, replay) == (0, 0, 0)


def test_summaries_are_plain_values():
    import json

    load = trace()
    replay = simulate(load, TOPOLOGY, costs=FREE, threshold=0.9)
    figures = json.loads(json.dumps(summarize(replay, simulate(load, TOPOLOGY, policy="static", costs=FREE))))
    assert figures["mean_balancedness"] == replay.mean_balancedness
    assert figures["moved_experts"] == sum(event["moved_experts"] for event in figures["events"])
    assert figures["bytes_across_nodes"] <= figures["bytes_moved"]
    assert len(figures["balancedness"]) == len(figures["window_seconds"]) == 8
    assert figures["events"][0]["reason"] == "rebalance"
    assert set(figures["gain"]) == {"share", "low", "high"}
    short = summarize(simulate(load[:3], TOPOLOGY))
    assert short["mean_balancedness_interval"] == [None, None]


def test_progress_counts_windows():
    counted = []
    simulate(trace(), TOPOLOGY, progress=counted.append)
    assert sum(counted) == 9
    reported = []
    sweep(
        trace(),
        grid(TOPOLOGY, policy=["greedy", "static"]),
        progress=lambda done, total: reported.append((done, total)),
    )
    assert reported[-1] == (18, 18)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)


# Sweeps


def figures(replay):
    """All of a replay but the planning times."""
    events = [event._replace(planning_seconds=0) for event in replay.events]
    return replay.configuration, replay.balancedness.tolist(), replay.placements.tolist(), events


def test_processes_give_the_same_replays_in_the_same_order():
    load = trace()
    configurations = grid([TOPOLOGY, Topology(2, 6)], policy=["static", "greedy", rotate], interval=[1, 3])
    one, two = (sweep(load, configurations, costs=FREE, jobs=jobs) for jobs in (1, 2))
    assert [replay.configuration for replay in two] == list(configurations)
    for a, b in zip(one, two, strict=True):
        assert figures(a) == figures(b)


def test_only_the_last_placement_is_kept_on_request():
    whole, last = (sweep(trace(), [Configuration(TOPOLOGY)], keep_placements=keep)[0] for keep in (True, False))
    assert len(whole.placements) == 9
    np.testing.assert_array_equal(last.placements, whole.placements[-1:])


def die(load, topology, previous):
    """A policy whose process ends."""
    os._exit(3)


def fail(load, topology, previous):
    """A policy that fails."""
    raise ZeroDivisionError("no ranks")


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_names_its_configuration(jobs):
    wrong = [Configuration(TOPOLOGY), Configuration(TOPOLOGY, options={"max_moves": -1})]
    with pytest.raises(EplbError, match=r"max_moves=-1.*configuration 1, 'incremental, max_moves=-1'"):
        sweep(trace(), wrong, jobs=jobs)
    with pytest.raises(SimulationError, match=r"configuration 1, 'fail': ZeroDivisionError"):
        sweep(trace(), grid(TOPOLOGY, policy=["static", fail]), jobs=jobs)


def dawdle(load, topology, previous):
    """A policy that takes its time."""
    time.sleep(1.5)
    return previous


def test_the_others_stop_when_one_fails():
    start = time.monotonic()
    with pytest.raises(SimulationError, match="'fail'"):
        sweep(trace(shape=(60, 2, 10)), grid(TOPOLOGY, policy=[dawdle, fail]), jobs=2)
    assert time.monotonic() - start < 60  # of 90 seconds
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_an_error_and_not_a_hang():
    with pytest.raises(SimulationError, match="ended before its work did"):
        sweep(trace(), grid(TOPOLOGY, policy=["static", die]), jobs=2)


def test_the_environment_is_left_as_it_was(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    sweep(trace(), grid(TOPOLOGY, policy=["static", "greedy"]), jobs=2)
    assert dict(os.environ) == before


# Configurations


def test_a_grid_is_every_combination_and_the_last_choice_varies_fastest():
    found = grid([Topology(2, 5), TOPOLOGY], policy=["greedy", "refined"], interval=[1, None], threshold=0.9)
    assert len(found) == 8
    assert [c.label for c in found[:4]] == [
        "greedy, below 0.9",
        "greedy, once, below 0.9",
        "refined, below 0.9",
        "refined, once, below 0.9",
    ]
    assert found[4].topology == TOPOLOGY


def test_labels_say_all_that_differs():
    configuration = Configuration(
        TOPOLOGY,
        estimator="window:4",
        interval=5,
        threshold=0.9,
        hysteresis=0.1,
        min_gain=0.02,
        horizon=8,
        min_return=2.0,
        start="even",
        options={"tolerance": 0.1},
    )
    assert configuration.label == (
        "incremental, window:4, every 5, below 0.9, by 0.1, gain 0.02, if paid 2-fold in 8, even start, tolerance=0.1"
    )
    assert len({configuration, Configuration(TOPOLOGY)}) == 2


configure = partial(Configuration, TOPOLOGY)
REFUSED = {
    "one window": (lambda: simulate(trace()[:1], TOPOLOGY), r"shape=\(1, 2, 10\).*Record more windows"),
    "no windows axis": (lambda: simulate(trace()[0], TOPOLOGY), r"shape=\(2, 10\)"),
    "floating load": (lambda: simulate(trace() * 1.0, TOPOLOGY), r"must hold integers; got dtype=float64"),
    "negative load": (lambda: simulate(trace() - 10**6, TOPOLOGY), r"negative entries"),
    "too many experts": (lambda: simulate(trace(), Topology(3, 3)), r"num_logical=10, num_slots=9"),
    "unknown policy": (lambda: configure("magic"), r"policy='magic'"),
    "no interval": (lambda: configure(interval=0), r"interval=0"),
    "threshold above 1": (lambda: configure(threshold=1.5), r"threshold=1.5"),
    "hysteresis above the threshold": (lambda: configure(threshold=0.5, hysteresis=0.6), r"hysteresis=0.6"),
    "no horizon": (lambda: configure(horizon=0), r"horizon=0"),
    "gain of all": (lambda: configure(min_gain=1.5), r"min_gain=1.5"),
    "unknown start": (lambda: configure(start="random"), r"start='random'"),
    "unknown estimator": (lambda: configure(estimator="guess"), r"estimator='guess'"),
    "estimator without number": (lambda: parse_estimator("window"), r"estimator='window'"),
    "estimator with a needless number": (lambda: parse_estimator("last:2"), r"estimator='last:2'"),
    "half a window": (lambda: parse_estimator("window:1.5"), r"estimator='window:1.5'"),
    "no half-life": (lambda: parse_estimator("decay:0"), r"half_life=0"),
    "no jobs": (lambda: sweep(trace(), [Configuration(TOPOLOGY)], jobs=0), r"jobs=0"),
    "no bandwidth": (lambda: Links(within_node=0), r"within_node=0"),
    "bandwidth not a number": (lambda: Links(across_nodes=float("nan")), r"across_nodes=nan"),
    "negative latency": (lambda: Links(latency=-1), r"latency=-1"),
    "negative bytes": (lambda: Costs(bytes_per_expert=-1), r"bytes_per_expert=-1"),
    "endless tokens": (lambda: Costs(seconds_per_token=float("inf")), r"seconds_per_token=inf"),
    "no scale": (lambda: Costs(scale=0), r"scale=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_cannot_be_met_say_why(name):
    call, message = REFUSED[name]
    with pytest.raises(EplbError, match=message):
        call()


# Intervals


def correlated(rng, windows, phi):
    noise, series = rng.normal(size=windows + 50), np.zeros(windows + 50)
    for window in range(1, windows + 50):
        series[window] = phi * series[window - 1] + noise[window]
    return series[50:]


@pytest.mark.parametrize(("windows", "phi"), [(12, 0.0), (30, 0.5), (100, 0.5)])
def test_intervals_cover_the_mean_about_as_often_as_they_say(windows, phi):
    rng = np.random.default_rng(0)
    ends = [mean_interval(correlated(rng, windows, phi)) for _ in range(150)]
    assert 0.88 <= np.mean([low <= 0 <= high for low, high in ends]) <= 1


def test_intervals_hold_for_the_luckiest_of_many():
    rng = np.random.default_rng(1)
    joint, single = [], []
    for _ in range(60):
        series = rng.normal(size=(30, 50))
        estimates, resampled = series.mean(axis=1), resample_weights(50, resamples=400) @ series.T
        best = int(estimates.argmax())
        joint.append(joint_intervals(estimates, resampled, 50)[0, best] <= 0)
        single.append(mean_interval(series[best])[0] <= 0)
    assert np.mean(joint) > 0.9 > np.mean(single)


def test_samples_are_blocks_of_neighbours():
    weights = resample_weights(16, resamples=50)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    counts = np.rint(weights * 16).astype(int)
    np.testing.assert_allclose(weights * 16, counts)
    # Drawn windows come in runs of 4, so a change of count from one window to the next happens at most 8 times.
    assert (np.count_nonzero(counts != np.roll(counts, 1, axis=1), axis=1) <= 8).all()
    np.testing.assert_array_equal(weights, resample_weights(16, resamples=50))
    assert (resample_weights(16, resamples=50, seed=1) != weights).any()


def test_few_windows_have_no_interval():
    assert mean_interval(np.arange(5.0)) == (-np.inf, np.inf)
    low, high = mean_interval(np.arange(6.0))
    assert low < 2.5 < high < np.inf
    assert np.isinf(joint_intervals(np.zeros(2), np.zeros((10, 2)), 5)).all()
