"""Whether to enable an expert-parallelism load balancer, and how: a sweep over a trace, and rules for its answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core._checks import require
from eplb_core.advise.advice import Advice, Candidate, Verdict
from eplb_core.bound import load_bound
from eplb_core.costs import Costs
from eplb_core.metrics import rank_load
from eplb_core.policies import POLICIES
from eplb_core.simulate import check_trace
from eplb_core.simulate.bootstrap import joint_intervals, resample_weights
from eplb_core.simulate.configuration import STATIC, Configuration, grid
from eplb_core.simulate.replay import Gain, Replay, gain
from eplb_core.simulate.sweep import Progress, sweep
from eplb_core.topology import Topology

MINIMUM_GAIN = 0.02
"""Share of the time of expert layers below which a gain is not worth the complexity of moving weights."""

NEAR_BEST = 0.01
"""Share of that time which is given up for fewer redundant experts and rarer plans."""

FEWEST_WINDOWS = 9
"""Shorter traces get no recommendation."""


def advise(
    load: Int[Any, "windows layers logical"],
    ep_size: int,
    *,
    num_nodes: int = 1,
    policies: Sequence[str] = POLICIES,
    intervals: Sequence[int | None] | None = None,
    estimators: Sequence[str] = ("last",),
    redundancies: Sequence[int] | None = None,
    max_redundant: int | None = None,
    minimum_gain: float = MINIMUM_GAIN,
    costs: Costs | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Advice:
    """Replay a trace with every combination, and choose one or none.

    A combination can be chosen if both its gain over no load balancer and its gain over the same slots filled evenly
    are at least `minimum_gain` at the lower end of their confidence intervals, which hold for all combinations at
    once, so that the luckiest of many is not taken for the best. Among those, all within `NEAR_BEST` of the largest
    gain are as good; of them the one with the fewest redundant experts is chosen, then the one that plans most
    rarely, then the one that moves fewest bytes. If there is none, `Verdict` says why.

    Time is that of the expert layers: where they are half of a step, half of the gain arrives. Moving is charged to
    the windows that a placement serves, none beyond the end of the trace.

    Args:
        load: `[windows, layers, logical]` tokens, at least two windows.
        ep_size: ranks.
        num_nodes: hosts, a divisor of `ep_size`.
        policies: of `rebalance`.
        intervals: windows between plans, None for a single plan; by default 1, 2, 4, ... up to half of the trace, and
            None.
        estimators: as in `Configuration`.
        redundancies: numbers of redundant experts; by default the smallest that fits, and that plus 1, 2, 4, ... slots
            per rank, up to `max_redundant`.
        max_redundant: most redundant experts; by default half of the experts.
        minimum_gain: share of the time that must be saved.
        costs: what serving and moving cost; `Costs()` by default.
        jobs: processes, as for `sweep`.
        progress: as for `sweep`.

    Returns:
        `Advice`.

    Raises:
        EplbError: if the trace is malformed or an argument is out of range.
        SimulationError: as `sweep`.

    >>> load = np.tile([[[900, 100, 100, 100, 100, 100, 100, 100]]], (20, 1, 1)) + np.arange(20)[:, None, None] % 3
    >>> advice = advise(load, ep_size=4, costs=Costs(bytes_per_expert=10, seconds_per_token=1e-3))
    >>> advice.verdict.value, advice.chosen.num_redundant, advice.chosen.replay.configuration.label
    ('enable', 4, 'refined, once')
    """
    load, costs = check_trace(load), costs or Costs()
    _check(minimum_gain, max_redundant)
    redundancies = _redundancies(load.shape[2], ep_size, max_redundant) if redundancies is None else redundancies
    topologies = {
        count: Topology.from_experts(load.shape[2], ep_size, num_redundant=count, num_nodes=num_nodes)
        for count in sorted({-load.shape[2] % ep_size, *redundancies})
    }
    intervals = _intervals(len(load)) if intervals is None else intervals
    chosen = [topologies[count] for count in redundancies]
    configurations = grid(chosen, policy=list(policies), interval=list(intervals), estimator=list(estimators))
    possible = _possible_gain(load, topologies)
    if len(load) < FEWEST_WINDOWS:
        return Advice(Verdict.TOO_SHORT, None, minimum_gain, possible, Gain(0.0, 0.0, 0.0), None, ())
    blind = [Configuration(topology, STATIC, start="even") for topology in topologies.values()]
    blind[0] = Configuration(blind[0].topology, STATIC)
    replays = sweep(load, [*blind, *configurations], costs=costs, jobs=jobs, progress=progress, keep_placements=False)
    baselines = dict(zip(topologies.values(), replays[: len(blind)], strict=True))
    candidates = _candidates(replays[len(blind) :], baselines, *load.shape[1:])
    return _judge(candidates, baselines, minimum_gain, possible)


def _judge(candidates: list[Candidate], baselines: dict[Topology, Replay], minimum: float, possible: float) -> Advice:
    none = next(iter(baselines.values()))
    even = max(gain(replay, none) for replay in baselines.values())
    sure = [c for c in candidates if min(c.gain.low, c.gain_over_even.low) >= minimum]
    net = [min(c.gain.share, c.gain_over_even.share) for c in candidates]
    gross = max(c.gross_gain.share for c in candidates)
    foreseen = gross >= minimum and max(c.gross_gain.low for c in candidates) > 0
    if sure:
        verdict = Verdict.ENABLE
    elif possible < minimum:
        verdict = Verdict.BALANCED
    elif not foreseen:
        verdict = Verdict.REDUNDANCY_ALONE if even.low >= minimum else Verdict.UNPREDICTABLE
    else:
        verdict = Verdict.COST if max(net) < minimum else Verdict.NOISE
    chosen = _simplest(sure) if sure else candidates[int(np.argmax(net))]
    scale = _break_even_scale(candidates, baselines, minimum)
    return Advice(verdict, chosen, minimum, possible, even, scale, tuple(candidates))


def _simplest(sure: list[Candidate]) -> Candidate:
    """Of those near the best: fewest redundant experts, then fewest plans, then fewest bytes, then the first."""
    best = max(candidate.gain.share for candidate in sure)
    near = [candidate for candidate in sure if candidate.gain.share >= best - NEAR_BEST]
    return min(near, key=lambda c: (c.num_redundant, len(c.replay.events), c.replay.bytes_moved))


def _candidates(
    replays: Sequence[Replay], baselines: dict[Topology, Replay], num_layers: int, num_logical: int
) -> list[Candidate]:
    """Gains of all replays over both baselines, with intervals for all at once."""
    none = next(iter(baselines.values())).serving_seconds
    evens = np.stack([baselines[replay.configuration.topology].serving_seconds for replay in replays])
    serving = np.stack([replay.serving_seconds for replay in replays])
    spent = np.stack([replay.amortised_seconds for replay in replays])
    least = np.minimum(none.sum(), evens.sum(axis=1))
    net = _gains(np.concatenate([spent, spent]), np.concatenate([np.tile(none, (len(replays), 1)), evens]))
    gross = _gains(serving, np.where((evens.sum(axis=1) == least)[:, None], evens, none))
    found = []
    for index, replay in enumerate(replays):
        topology, costs = replay.configuration.topology, replay.costs
        extra = (topology.num_slots - num_logical) * num_layers * costs.bytes_per_expert
        both = net[index], net[index + len(replays)]
        found.append(
            Candidate(replay, topology.num_slots - num_logical, -(-extra // topology.ep_size), *both, gross[index])
        )
    return found


def _gains(spent: np.ndarray, base: np.ndarray) -> list[Gain]:
    """Shares saved, each with the ends of its joint interval, from series of seconds `[figures, windows]`."""
    weights = resample_weights(spent.shape[1])
    estimates = np.asarray([_saved(*pair) for pair in zip(spent, base, strict=True)])
    sampled = weights @ base.T
    resampled = np.where(sampled > 0, 1 - (weights @ spent.T) / np.where(sampled > 0, sampled, 1.0), 0.0)
    low, high = joint_intervals(estimates, resampled, spent.shape[1])
    return [Gain(*map(float, figures)) for figures in zip(estimates, low, high, strict=True)]


def _saved(spent: np.ndarray, base: np.ndarray) -> float:
    """Share of the base's seconds that is saved; 0 if the base takes none."""
    return float(1 - spent.sum() / base.sum()) if base.sum() > 0 else 0.0


def _possible_gain(load: np.ndarray, topologies: dict[int, Topology]) -> float:
    """What a placement would save over round-robin that is best for each window, in the most slots: a bound."""
    fewest, most = topologies[min(topologies)], topologies[max(topologies)]
    start = Configuration(fewest).first_placement(*load.shape[1:])
    busiest = rank_load(start, load[1:], fewest).max(axis=-1)
    return _saved(np.asarray(load_bound(load[1:], most)), busiest)


def _break_even_scale(candidates: list[Candidate], baselines: dict[Topology, Replay], minimum: float) -> float | None:
    """The least factor on tokens with which a candidate gains the minimum over both baselines."""
    factors = []
    for candidate in candidates:
        replay = candidate.replay
        moving = float((replay.critical_path_seconds - replay.serving_seconds).sum())
        bases = next(iter(baselines.values())), baselines[replay.configuration.topology]
        totals = [float(base.serving_seconds.sum()) for base in bases]
        left = [total * (1 - minimum) - float(replay.serving_seconds.sum()) for total in totals]
        if min(left) > 0:
            factors.append(moving / min(left))
    return min(factors, default=None)


def _redundancies(num_logical: int, ep_size: int, max_redundant: int | None) -> list[int]:
    """The fewest redundant experts that fit, then 1, 2, 4, ... slots more on each rank."""
    fewest = -num_logical % ep_size
    most = num_logical // 2 if max_redundant is None else max_redundant
    require(
        fewest <= most or max_redundant is None,
        "`advise(max_redundant=...)` must let the slots split evenly over the ranks",
        f"max_redundant={max_redundant}, num_logical={num_logical}, ep_size={ep_size}",
        f"Allow at least {fewest}.",
    )
    found, extra = [fewest], 1
    while fewest + extra * ep_size <= most:
        found.append(fewest + extra * ep_size)
        extra *= 2
    return found


def _intervals(num_windows: int) -> list[int | None]:
    """1, 2, 4, ... up to half of the judged windows, and once."""
    found: list[int | None] = [2**k for k in range(num_windows.bit_length()) if 2**k <= (num_windows - 1) // 2]
    return [*found, None]


def _check(minimum_gain: float, max_redundant: int | None) -> None:
    require(
        0 <= minimum_gain < 1,
        "`advise(minimum_gain=...)` must be in [0, 1)",
        f"minimum_gain={minimum_gain}",
        "0.02 asks for 2 % of the time of the expert layers.",
    )
    require(
        max_redundant is None or max_redundant >= 0,
        "`advise(max_redundant=...)` must be >= 0",
        f"max_redundant={max_redundant}",
        "Use 0 to only move experts around.",
    )
