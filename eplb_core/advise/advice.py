"""An answer to whether a load balancer should be enabled, with the figures behind it."""

from enum import StrEnum
from typing import Any, NamedTuple

from eplb_core.simulate.replay import Gain, Replay, summarize
from eplb_core.units import in_units


class Verdict(StrEnum):
    """The answer, in one word. All but `ENABLE` mean: do not enable it.

    ENABLE: the chosen configuration gains at least the minimum, surely.
    TOO_SHORT: the trace has fewer windows than `FEWEST_WINDOWS`.
    BALANCED: no placement whatever could gain the minimum.
    UNPREDICTABLE: placements made from the past do not gain on the next window, or the trace is too short to tell.
    REDUNDANCY_ALONE: the same, but redundant experts that are spread evenly and never moved do gain the minimum.
    COST: placements made from the past gain, but moving the weights takes too much of it.
    NOISE: there is a gain of at least the minimum, but its confidence interval reaches below.
    """

    ENABLE = "enable"
    TOO_SHORT = "too_short"
    BALANCED = "balanced"
    REDUNDANCY_ALONE = "redundancy_alone"
    UNPREDICTABLE = "unpredictable"
    COST = "cost"
    NOISE = "noise"


class Candidate(NamedTuple):
    """One configuration of the sweep. Gains are shares of time (`Replay.amortised_seconds`), their intervals joint.

    replay: its run, with the last placement only.
    num_redundant: slots beyond one per expert.
    extra_bytes_per_rank: memory for them, all layers together.
    gain: over no load balancer: the fewest slots that fit, round-robin, never changed.
    gain_over_even: over the same slots filled without knowing the traffic, evenly.
    gross_gain: the smaller of both, if moving weights took no time.
    """

    replay: Replay
    num_redundant: int
    extra_bytes_per_rank: int
    gain: Gain
    gain_over_even: Gain
    gross_gain: Gain


class Advice(NamedTuple):
    """What to do.

    verdict: the answer.
    chosen: the configuration to enable; where that is not advised, the one that gains most. None if nothing was swept.
    minimum_gain: what was asked for.
    possible_gain: upper bound on the gain of any placement in the most slots of the sweep.
    even_gain: the most that redundant experts gain without knowing the traffic.
    break_even_scale: how many times as much traffic per window the trace must stand for so that some candidate gains
        the minimum in spite of its moves; None if none would.
    candidates: the whole sweep.
    """

    verdict: Verdict
    chosen: Candidate | None
    minimum_gain: float
    possible_gain: float
    even_gain: Gain
    break_even_scale: float | None
    candidates: tuple[Candidate, ...]

    @property
    def recommend(self) -> bool:
        """Whether to enable it."""
        return self.verdict is Verdict.ENABLE

    @property
    def gross_gain(self) -> Gain:
        """The largest `gross_gain` of the candidates."""
        return max(candidate.gross_gain for candidate in self.candidates)


def explain(advice: Advice) -> str:
    """Say in a sentence or two what to do and why, with figures.

    Time is that of the expert layers on the critical path.
    """
    return _SENTENCES[advice.verdict](advice, advice.chosen)


def _enable(advice: Advice, chosen: Candidate) -> str:
    configuration, replay = chosen.replay.configuration, chosen.replay
    cadence = "once" if configuration.interval is None else f"every {_windows(configuration.interval)}"
    sent = replay.bytes_moved / len(replay.balancedness)
    return (
        f"Enable it: policy {configuration.policy_name}, {chosen.num_redundant} redundant experts, planned {cadence}. "
        f"It saves {_percent(chosen.gain)} of the time that the expert layers take without a load balancer, moves "
        f"included, for {in_units(sent)} of traffic per window and {in_units(chosen.extra_bytes_per_rank)} of memory "
        "per rank."
    )


def _too_short(advice: Advice, _: Any) -> str:
    return (
        "Do not enable it on this evidence: the trace is too short to say. Record at least 9 windows of the traffic "
        f"that is to be served. In this one the best placement for each window would save {advice.possible_gain:.1%} "
        "at most."
    )


def _balanced(advice: Advice, _: Any) -> str:
    return (
        "Do not enable it: the load is balanced already. Even the best placement for each window would save "
        f"{advice.possible_gain:.1%} at most, and {advice.minimum_gain:.1%} is asked for."
    )


def _unpredictable(advice: Advice, _: Any) -> str:
    return (
        "Do not enable it: the past does not foretell the next window, or the trace is too short to show it. "
        f"Placements made from the past save {_percent(advice.gross_gain)} there at best, moves not counted; the best "
        f"placement for each window itself would save {advice.possible_gain:.1%} at most."
    )


def _redundancy_alone(advice: Advice, _: Any) -> str:
    return (
        "Do not enable it, but consider redundant experts: spread evenly and never moved, they save "
        f"{_percent(advice.even_gain)}. Placements made from the past save {_percent(advice.gross_gain)} more than the "
        "better of that and nothing, moves not counted."
    )


def _cost(advice: Advice, chosen: Candidate) -> str:
    far = ""
    if advice.break_even_scale is not None:
        far = f" It would begin to pay if each window stood for {advice.break_even_scale:.2g} times as many tokens."
    return (
        f"Do not enable it at these costs: placements made from the past save {_percent(advice.gross_gain)} at best, "
        f"but with the moves {chosen.replay.configuration.label}, the best then, saves {_percent(chosen.gain)}.{far}"
    )


def _noise(advice: Advice, chosen: Candidate) -> str:
    return (
        f"Do not enable it on this evidence: the best configuration saves {_percent(chosen.gain)}, and "
        f"{advice.minimum_gain:.1%} must be sure. Record more windows."
    )


_SENTENCES = {
    Verdict.ENABLE: _enable,
    Verdict.TOO_SHORT: _too_short,
    Verdict.BALANCED: _balanced,
    Verdict.UNPREDICTABLE: _unpredictable,
    Verdict.REDUNDANCY_ALONE: _redundancy_alone,
    Verdict.COST: _cost,
    Verdict.NOISE: _noise,
}


def summarize_advice(advice: Advice) -> dict[str, Any]:
    """Give an answer as plain values for JSON, with every candidate."""
    return {
        "recommend": advice.recommend,
        "verdict": advice.verdict.value,
        "explanation": explain(advice),
        "minimum_gain": advice.minimum_gain,
        "possible_gain": advice.possible_gain,
        "even_gain": advice.even_gain.as_json(),
        "break_even_scale": advice.break_even_scale,
        "chosen": None if advice.chosen is None else _summarize(advice.chosen),
        "candidates": [_summarize(candidate) for candidate in advice.candidates],
    }


def _summarize(candidate: Candidate) -> dict[str, Any]:
    figures = summarize(candidate.replay)
    for long in ("events", "balancedness", "window_seconds"):
        del figures[long]
    return figures | {
        "redundant": candidate.num_redundant,
        "extra_bytes_per_rank": candidate.extra_bytes_per_rank,
        "bytes_moved_per_window": candidate.replay.bytes_moved / len(candidate.replay.balancedness),
        "gain": candidate.gain.as_json(),
        "gain_over_even": candidate.gain_over_even.as_json(),
        "gross_gain": candidate.gross_gain.as_json(),
    }


def _percent(gain: Gain) -> str:
    return f"{gain.share:.1%} ({gain.low:.1%} to {gain.high:.1%})"


def _windows(count: int) -> str:
    return "window" if count == 1 else f"{count} windows"
