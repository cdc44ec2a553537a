"""What replaying a trace under one configuration has found."""

from typing import Any, NamedTuple

import numpy as np

from eplb_core.control.decision import Decision, Reason
from eplb_core.costs import Costs, Migration
from eplb_core.simulate.bootstrap import interval, mean_interval, resample_weights
from eplb_core.simulate.configuration import Configuration


class Event(NamedTuple):
    """A window after which a plan was due.

    window: the last window that the decision knew.
    decision: what was decided, and why.
    migration: what was sent: nothing unless the decision's reason is `REBALANCE`.
    planning_seconds: wall-clock time of the policy; 0 if it was not called.
    """

    window: int
    decision: Decision
    migration: Migration
    planning_seconds: float


class Replay(NamedTuple):
    """A configuration's run through a trace. Row `i` is window `i + 1`: the first window is never judged.

    configuration: what ran.
    costs: what serving and moving were taken to cost.
    balancedness: `[windows - 1, layers]` under the placement that was in force.
    busiest_load: `[windows - 1, layers]` tokens of the busiest rank.
    events: one per window after which a plan was due, in order.
    placements: int32 `[1 + rebalances, layers, slots]`, the start first; only the last one if the others were dropped.
    """

    configuration: Configuration
    costs: Costs
    balancedness: Any
    busiest_load: Any
    events: tuple[Event, ...]
    placements: Any

    @property
    def rebalances(self) -> tuple[Event, ...]:
        """The events that put a plan in force, also one that moved nothing."""
        return tuple(event for event in self.events if event.decision.reason is Reason.REBALANCE)

    @property
    def mean_balancedness(self) -> float:
        """Mean over judged windows and layers."""
        return float(self.balancedness.mean())

    @property
    def moved_experts(self) -> int:
        """Experts that ranks had to receive, over all rebalances."""
        return sum(event.migration.moved_experts for event in self.events)

    @property
    def bytes_moved(self) -> int:
        """Their bytes."""
        return sum(event.migration.bytes_moved for event in self.events)

    @property
    def planning_seconds(self) -> float:
        """Wall-clock time of the policy over all events: the one figure that differs from run to run."""
        return float(sum(event.planning_seconds for event in self.events))

    @property
    def serving_seconds(self) -> np.ndarray:
        """`[windows - 1]` time of the busiest ranks, summed over layers."""
        return self.costs.serving_seconds(self.busiest_load)

    @property
    def migration_seconds(self) -> np.ndarray:
        """`[windows - 1]` time of the migration that came just before each window."""
        seconds = np.zeros(len(self.balancedness))
        for event in self.events:
            seconds[event.window] = event.migration.seconds
        return seconds

    @property
    def critical_path_seconds(self) -> np.ndarray:
        """`[windows - 1]` serving, and migration unless it is overlapped."""
        return self.serving_seconds + (0 if self.costs.overlapped else self.migration_seconds)

    @property
    def amortised_seconds(self) -> np.ndarray:
        """`[windows - 1]` as `critical_path_seconds`, each migration spread over the windows that it serves.

        Adds up to the same. A first placement that moves everything is one expense for all windows, not chance.
        """
        if self.costs.overlapped or not self.rebalances:
            return self.critical_path_seconds
        first = np.asarray([event.window for event in self.rebalances])
        lasted = np.diff(np.append(first, len(self.balancedness)))
        spread = np.zeros(len(self.balancedness))
        spread[first[0] :] = np.repeat(self.migration_seconds[first] / lasted, lasted)
        return self.serving_seconds + spread


class Gain(NamedTuple):
    """A share of time that is saved, and its confidence interval.

    share: 0.1 if a tenth is saved; negative if more is spent.
    low, high: ends of the interval; infinite where the trace is too short for one.
    """

    share: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """By name; None for an infinite end, which JSON does not have."""
        return {name: value if np.isfinite(value) else None for name, value in self._asdict().items()}


def gain(replay: Replay, baseline: Replay) -> Gain:
    """Compare critical paths: `1 - seconds / seconds of the baseline`, 0 if the baseline takes no time.

    The interval is the block bootstrap's over windows (see `bootstrap`), each migration being spread over the windows
    that its placement serves.
    """
    base, spent = baseline.amortised_seconds, replay.amortised_seconds
    if not base.sum() > 0:
        return Gain(0.0, 0.0, 0.0)
    estimate = float(1 - spent.sum() / base.sum())
    weights = resample_weights(len(base))
    resampled = weights @ base
    resampled = 1 - weights @ spent / np.where(resampled > 0, resampled, 1.0)
    return Gain(estimate, *interval(estimate, resampled, len(base)))


def summarize(replay: Replay, baseline: Replay | None = None) -> dict[str, Any]:
    """Give a replay's figures as plain values for JSON; unbounded ends of intervals are None.

    Args:
        replay: what to summarize.
        baseline: what `gain` compares with; left out without it.
    """
    configuration, topology = replay.configuration, replay.configuration.topology
    result = {
        "policy": configuration.policy_name,
        "label": configuration.label,
        "estimator": configuration.estimator,
        "interval": configuration.interval,
        "threshold": configuration.threshold,
        "hysteresis": configuration.hysteresis,
        "min_gain": configuration.min_gain,
        "horizon": configuration.horizon,
        "min_return": configuration.min_return,
        "start": configuration.start,
        "options": dict(configuration.options),
        "ranks": topology.ep_size,
        "slots_per_rank": topology.slots_per_rank,
        "nodes": topology.num_nodes,
        "mean_balancedness": replay.mean_balancedness,
        "mean_balancedness_interval": _bounded(mean_interval(replay.balancedness.mean(axis=1))),
        "moved_experts": replay.moved_experts,
        "bytes_moved": replay.bytes_moved,
        "bytes_across_nodes": sum(event.migration.bytes_across_nodes for event in replay.events),
        "planning_seconds": replay.planning_seconds,
        "migration_seconds": float(replay.migration_seconds.sum()),
        "serving_seconds": float(replay.serving_seconds.sum()),
        "critical_path_seconds": float(replay.critical_path_seconds.sum()),
        "num_rebalances": len(replay.rebalances),
        "events": [_event(event) for event in replay.events],
        "balancedness": replay.balancedness.mean(axis=1).tolist(),
        "window_seconds": replay.critical_path_seconds.tolist(),
    }
    if baseline is not None:
        result["gain"] = gain(replay, baseline).as_json()
    return result


def _bounded(ends: tuple[float, float]) -> list[float | None]:
    return [end if np.isfinite(end) else None for end in ends]


def _event(event: Event) -> dict[str, Any]:
    decision, migration = event.decision, event.migration
    return {
        "window": event.window,
        "reason": decision.reason.value,
        "expected_balancedness_before": decision.balancedness,
        "expected_balancedness_after": decision.predicted_balancedness,
        "planning_seconds": event.planning_seconds,
        "moved_experts": migration.moved_experts,
        "bytes_moved": migration.bytes_moved,
        "bytes_across_nodes": migration.bytes_across_nodes,
        "rounds": migration.rounds,
        "migration_seconds": migration.seconds,
    }
