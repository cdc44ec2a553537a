"""The steps of one phase of traffic, and the figures drawn from them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eplb_torch.demo.hosts import Hosts, balancedness_of_layers
from eplb_torch.demo.results import PhaseResult, median, overall_balancedness
from eplb_torch.demo.traffic import WINDOW_STEPS


@dataclass(frozen=True, slots=True)
class Step:
    """One batch as all ranks together served it: one forward each, and the boundary after it.

    tokens, requests: in the batch.
    compared: requests whose logits were compared with the unmodified model's.
    ranks: that served it.
    load: `[layers, logical]` of all ranks.
    rank_load: `[layers, ep_size]` under the placement that the batch was served by; NaN for lost ranks.
    seconds: of the forward and of `ExpertBalancer.step`, on the slowest rank.
    stall_seconds: of `ExpertBalancer.step` alone, on the slowest rank.
    planning_seconds, moving_seconds: of the balancer so far in this phase, on the slowest rank.
    during_moves: whether weights were on their way to another placement meanwhile, on any rank.
    settled: whether they are not, on all ranks, and the balancer has decided often enough to know this traffic.
    difference: largest of any logit from the unmodified model's, on any rank.
    switched_layers: whose placement has changed at the boundary.
    moved_experts, bytes_moved: that ranks have received for it.
    """

    tokens: int
    requests: int
    compared: int
    ranks: tuple[int, ...]
    load: Int[np.ndarray, "layers logical"]
    rank_load: Float[np.ndarray, "layers ep_size"]
    seconds: float
    stall_seconds: float
    planning_seconds: float
    moving_seconds: float
    during_moves: bool
    settled: bool
    difference: float
    switched_layers: int
    moved_experts: int
    bytes_moved: int


class Progress(NamedTuple):
    """Where a phase stands, for those who watch.

    traffic: what is served.
    step: batches served in this phase.
    found: balancedness of its first batches under the placement that it found.
    now: balancedness of the last `WINDOW_STEPS` batches, as they were served.
    predicted: balancedness that the last decision aims at, if there was one.
    during_moves: whether weights were on their way during the last step.
    decisions: how many the balancer has made in this phase.
    switched_layers, moved_experts, steps_during_moves: so far in this phase.
    idle_ms, moving_ms: milliseconds of the median step without and during moves; NaN if there was none.
    stall_ms: milliseconds spent in the balancer's `step`, so far in this phase.
    difference: largest of all logits so far in this phase.
    layer: the least balanced one in the last batches.
    rank_share: `[ep_size]` load of each rank / mean, in that layer; NaN for lost ranks.
    """

    traffic: str
    step: int
    found: float
    now: float
    predicted: float | None
    during_moves: bool
    decisions: int
    switched_layers: int
    moved_experts: int
    steps_during_moves: int
    idle_ms: float
    moving_ms: float
    stall_ms: float
    difference: float
    layer: int
    rank_share: Float[np.ndarray, " ep_size"]


class Record:
    """All steps of one phase, in their order.

    Args:
        traffic: what is served.
        found: where experts were when it began.
    """

    def __init__(self, traffic: str, found: Hosts):
        self._traffic, self._found = traffic, found
        self.steps: list[Step] = []

    def progress(self, predicted: float | None, decisions: int) -> Progress:
        """Sum up the steps so far."""
        window = _load_of(self.steps[-WINDOW_STEPS:])
        layer = int(np.argmin(balancedness_of_layers(window)))
        step_ms, during_moves = self._step_ms(), self._during_moves()
        return Progress(
            traffic=self._traffic,
            step=len(self.steps),
            found=overall_balancedness([self._load_before()]),
            now=overall_balancedness([window]),
            predicted=predicted,
            during_moves=self.steps[-1].during_moves,
            decisions=decisions,
            switched_layers=sum(step.switched_layers for step in self.steps),
            moved_experts=sum(step.moved_experts for step in self.steps),
            steps_during_moves=int(during_moves.sum()),
            idle_ms=median(step_ms[~during_moves]),
            moving_ms=median(step_ms[during_moves]),
            stall_ms=1e3 * sum(step.stall_seconds for step in self.steps),
            difference=self._difference(),
            layer=layer,
            rank_share=window[layer] / np.nanmean(window[layer]),
        )

    def result(self, after_steps: list[Step], decisions: dict[str, int]) -> PhaseResult:
        """Sum up the phase, some of whose steps served fresh batches when the balancer had acted."""
        before, after, last = self._load_before(), _load_of(after_steps), self.steps[-1]
        return PhaseResult(
            traffic=self._traffic,
            tokens=sum(step.tokens for step in self.steps[:WINDOW_STEPS]),
            requests=sum(step.requests for step in self.steps),
            requests_compared=sum(step.compared for step in self.steps),
            balancedness_before=overall_balancedness([before]),
            balancedness_after=overall_balancedness([after]),
            rank_load_before=before,
            rank_load_after=after,
            moved_experts=sum(step.moved_experts for step in self.steps),
            bytes_moved=sum(step.bytes_moved for step in self.steps),
            planning_ms=1e3 * last.planning_seconds,
            moving_ms=1e3 * last.moving_seconds,
            max_abs_logit_difference=self._difference(),
            stall_ms=1e3 * sum(step.stall_seconds for step in self.steps),
            decisions=decisions,
            step_ms=self._step_ms(),
            during_moves=self._during_moves(),
            around_loss=self._around_loss(),
        )

    def _load_before(self) -> Float[np.ndarray, "layers ep_size"]:
        """Of the first batches under the placement that they found, whatever has moved since."""
        load = np.sum([step.load for step in self.steps[:WINDOW_STEPS]], axis=0)
        return self._found.rank_load(load)

    def _around_loss(self) -> tuple[float, float] | None:
        """Balancedness of the last batches before the first loss, and of the first after it."""
        ranks = [step.ranks for step in self.steps]
        for i in range(1, len(ranks)):
            if ranks[i] != ranks[i - 1]:
                parts = self.steps[max(i - WINDOW_STEPS, 0) : i], self.steps[i : i + WINDOW_STEPS]
                before, after = (overall_balancedness([_load_of(steps)]) for steps in parts)
                return before, after
        return None

    def _difference(self) -> float:
        return float(np.max([step.difference for step in self.steps]))

    def _step_ms(self) -> np.ndarray:
        return np.asarray([1e3 * step.seconds for step in self.steps])

    def _during_moves(self) -> np.ndarray:
        return np.asarray([step.during_moves for step in self.steps])


def _load_of(steps: list[Step]) -> Float[np.ndarray, "layers ep_size"]:
    return np.sum([step.rank_load for step in steps], axis=0)
