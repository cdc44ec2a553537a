"""Replay a recorded trace: plan on what has been seen, judge on what comes next."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eplb_core import _ops, control
from eplb_core._checks import check_count, check_kind, check_load, require
from eplb_core.bound import load_bound
from eplb_core.control.decision import Decision, Reason, compare
from eplb_core.costs import Costs, migration_cost
from eplb_core.metrics import rank_load
from eplb_core.placement import check_placement, check_sizes
from eplb_core.simulate.configuration import MODEL, Configuration, parse_estimator
from eplb_core.simulate.replay import Event, Replay
from eplb_core.topology import Topology, check_topology


def simulate(
    load: Int[Any, "windows layers logical"],
    topology: Topology,
    *,
    policy: str | Callable[..., Any] = "incremental",
    estimator: str = "last",
    interval: int | None = 1,
    costs: Costs | None = None,
    progress: Callable[[int], Any] | None = None,
    **choices: Any,
) -> Replay:
    """Replay a trace under one configuration.

    The start placement is in force until the first plan. After window 0, and then after every `interval`-th, a plan is
    made for the estimate from all windows up to that one; it is in force from the next window on. Windows 1 and up
    are judged, each under the placement in force. Nothing is planned after the last window. Gates are those of
    `control.decide`; without any, each plan is carried out.

    Args:
        load: `[windows, layers, logical]` tokens, at least two windows.
        topology: ranks and slots.
        policy, estimator, interval: as in `Configuration`.
        costs: what serving and moving cost; `Costs()` by default.
        progress: called with 1 after each window that has been served, the first included.
        choices: further arguments of `Configuration`: the gates, `start` and `options`.

    Returns:
        `Replay`.

    Raises:
        EplbError: if the trace is too short or malformed, the experts do not fit the slots, or an argument is out of
            range.

    >>> load = np.asarray([[[2, 1, 8, 1]], [[1, 2, 8, 1]], [[1, 1, 9, 1]]])
    >>> replay = simulate(load, Topology(ep_size=2, slots_per_rank=3))
    >>> replay.balancedness.round(3).tolist(), replay.moved_experts
    ([[0.923], [1.0]], 2)
    """
    configuration = Configuration(topology, policy, estimator, interval, **choices)
    return replay_trace(load, configuration, Costs() if costs is None else costs, progress)


def replay_trace(
    load: Int[Any, "windows layers logical"],
    configuration: Configuration,
    costs: Costs,
    progress: Callable[[int], Any] | None = None,
) -> Replay:
    """Replay a trace under a configuration: what `simulate` does with its arguments."""
    load = check_trace(load)
    check_kind(configuration, Configuration, "replay_trace(configuration=...)")
    check_kind(costs, Costs, "simulate(costs=...)")
    check_kind(progress, (Callable, type(None)), "simulate(progress=...)")
    check_sizes(load.shape[2], configuration.topology, "simulate(topology=...)")
    placements = [configuration.first_placement(*load.shape[1:])]
    events, segments = [], [0]
    run = _gated if configuration.gated else _plain
    for event, placement in run(load, configuration, costs, placements[0], progress or (lambda _: None)):
        events.append(event)
        if event.decision.reason is Reason.REBALANCE:
            placements.append(placement)
            segments.append(event.window)
    mean, busiest = _judge(load, placements, segments, configuration.topology)
    balanced = np.divide(mean, busiest, out=np.ones_like(mean), where=busiest > 0)
    return Replay(configuration, costs, balanced, busiest, tuple(events), np.stack(placements))


def balancedness_bound(
    load: Int[Any, "windows layers logical"], topology: Topology
) -> Float[np.ndarray, "judged layers"]:
    """Balancedness that no placement can exceed, of every judged window and layer: the mean over `load_bound`.

    >>> balancedness_bound(np.asarray([[[1, 1, 1]], [[7, 1, 1]]]), Topology(ep_size=3, slots_per_rank=1)).round(3)
    array([[0.429]])
    """
    judged = check_trace(load)[1:]
    check_topology(topology, "balancedness_bound")
    mean, bound = judged.sum(axis=-1) / topology.ep_size, np.asarray(load_bound(judged, topology))
    return np.divide(mean, bound, out=np.ones_like(mean), where=bound > 0)


def check_trace(load: Int[Any, "windows layers logical"], fewest_windows: int = 2) -> Int[np.ndarray, "..."]:
    """Give a trace as a NumPy array, or refuse it.

    Raises:
        EplbError: if it is not integer `[windows, layers, logical]`, >= 0, with enough windows.
    """
    fewest_windows = check_count(fewest_windows, "check_trace(fewest_windows=...)", 1)
    load = np.asarray(_ops.as_array(load))
    check_load(load, "simulate(load=...)")
    require(
        load.ndim == 3 and len(load) >= fewest_windows,
        f"`simulate(load=...)` must be `[windows, layers, logical]` with at least {fewest_windows} windows",
        f"shape={load.shape}",
        "Record more windows: each plan is judged on the window that follows it.",
    )
    require(
        load.dtype.kind in "iu",
        "`simulate(load=...)` must hold integers",
        f"dtype={load.dtype}",
        "Count tokens, or round estimated counts with `numpy.rint(load).astype('int64')`.",
    )
    return load


def _plain(load, configuration: Configuration, costs: Costs, held, progress) -> Iterator[tuple[Event, np.ndarray]]:
    """The events of a trace, with the placement after each; every plan is carried out."""
    estimator, topology = parse_estimator(configuration.estimator), configuration.topology
    state = estimator.init(*load.shape[1:])
    for window, tokens in enumerate(load):
        if window < len(load) - 1:
            state = estimator.update(state, tokens)
            if configuration.is_due(window):
                planner, estimate = _Timed(configuration), np.asarray(estimator.estimate(state))
                plan = planner(estimate, topology, previous=held)
                before, after = (float(x) for x in compare(held, plan, estimate, topology).balancedness())
                decision = Decision(Reason.REBALANCE, before, after)
                yield _carried_out(window, decision, held, plan, costs, planner), plan
                held = plan
        progress(1)


def _gated(load, configuration: Configuration, costs: Costs, held, progress) -> Iterator[tuple[Event, np.ndarray]]:
    """The events of a trace, with the placement after each; the controller decides."""
    estimator, planner = parse_estimator(configuration.estimator), _Timed(configuration)
    config = configuration.control(load.shape[2], estimator, costs, planner)
    state = control.init(config, {MODEL: held})
    for window, tokens in enumerate(load):
        if window < len(load) - 1:
            state = control.observe(config, state, {MODEL: tokens})
            if configuration.is_due(window):
                planner.seconds = 0.0
                decisions = control.decide(config, state)
                state = control.adopt(config, state, decisions)
                plan = decisions[MODEL].placement
                if plan is not None and state.models[MODEL].target is not None:
                    state = control.commit(config, state, MODEL)
                plan = held if plan is None else plan
                yield _carried_out(window, decisions[MODEL], held, plan, costs, planner), plan
                held = plan
        progress(1)


def _carried_out(window: int, decision: Decision, held, plan, costs: Costs, planner: "_Timed") -> Event:
    migration = migration_cost(held, plan, planner.configuration.topology, costs)
    return Event(window, decision._replace(placement=None), migration, planner.seconds)


class _Timed:
    """A configuration's policy as a planner that remembers how long it took."""

    def __init__(self, configuration: Configuration):
        self.configuration = configuration
        self.seconds = 0.0

    def __call__(self, load: Any, topology: Topology, *, previous: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        plan = self.configuration.plan(load, previous)
        self.seconds += time.perf_counter() - start
        if callable(self.configuration.policy):
            check_placement(plan, topology, load.shape[1])
        return plan


def _judge(load: np.ndarray, placements: list, segments: list[int], topology: Topology):
    """Mean and busiest rank load of every judged window, `[windows - 1, layers]` each, placement by placement."""
    ends = [*segments[1:], len(load) - 1]
    judged = [
        rank_load(placement, load[first + 1 : end + 1], topology)
        for placement, first, end in zip(placements, segments, ends, strict=True)
        if end > first
    ]
    on_rank = np.concatenate(judged)
    return on_rank.mean(axis=-1), on_rank.max(axis=-1)
