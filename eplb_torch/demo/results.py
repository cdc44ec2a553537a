"""What a run of the demo found, and whether it kept its promises."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from eplb_core import Topology
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.demo.loss import LossResult

MIN_BALANCEDNESS = 0.85
MAX_LOGIT_DIFFERENCE = 1e-4

_NOT_IN_JSON = ("during_moves", "around_loss")


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One kind of traffic, from the first batch that showed it until the balancer had acted on it, and some more.

    "Before" is the load of the phase's first batches under the placement that the phase found; "after" is that of as
    many fresh batches, as they were served when the balancer had acted.

    traffic: what was served.
    tokens: in the batches before; as many were in those after.
    requests, requests_compared: served in all, and how many of them by the unmodified model as well.
    balancedness_before, balancedness_after: sum of the layers' mean rank loads / sum of their maxima.
    rank_load_before, rank_load_after: `[layers, ep_size]` tokens per rank, each counted once for each of its
        experts; NaN for lost ranks.
    moved_experts: (layer, rank, expert) that a rank received.
    bytes_moved: payload between processes.
    planning_ms: milliseconds of planning, on the slowest rank.
    moving_ms: milliseconds in which weights were on their way, on the slowest rank.
    max_abs_logit_difference: from the unmodified model, over every logit of the phase.
    stall_ms: serving time spent in the balancer's `step`, commits and waits included, on the slowest rank.
    decisions: how many the balancer made, by reason.
    step_ms: `[steps]` milliseconds from the beginning of each forward to the end of the balancer's `step`.
    during_moves: `[steps]` whether weights were on their way meanwhile.
    around_loss: balancedness of the last batches before a rank was lost and of the first after it; None without one.
    """

    traffic: str
    tokens: int
    requests: int
    requests_compared: int
    balancedness_before: float
    balancedness_after: float
    rank_load_before: Float[np.ndarray, "layers ep_size"]
    rank_load_after: Float[np.ndarray, "layers ep_size"]
    moved_experts: int
    bytes_moved: int
    planning_ms: float
    moving_ms: float
    max_abs_logit_difference: float
    stall_ms: float
    decisions: dict[str, int]
    step_ms: Float[np.ndarray, " steps"]
    during_moves: Bool[np.ndarray, " steps"]
    around_loss: tuple[float, float] | None = None

    @property
    def steps_during_moves(self) -> int:
        """Batches served while weights were on their way."""
        return int(self.during_moves.sum())

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists."""
        fields = {key: _plain(value) for key, value in asdict(self).items() if key not in _NOT_IN_JSON}
        return fields | _pace([self])


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How the model came about.

    steps: of the optimizer.
    seconds: wall-clock time.
    first_loss, last_loss: cross entropy in nats per token.
    """

    steps: int
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """A whole run.

    topology: sizes of the group.
    config: of the balancer.
    seed: of corpus, model and training.
    training: how the model came about.
    phases: what was served, in order.
    seconds: wall-clock time of the run.
    kill_rank: the rank that was to be killed, None for none.
    loss: what became of that.
    """

    topology: Topology
    config: BalancerConfig
    seed: int
    training: TrainingResult
    phases: tuple[PhaseResult, ...]
    seconds: float
    kill_rank: int | None = None
    loss: LossResult | None = None

    @property
    def max_abs_logit_difference(self) -> float:
        """The largest of all phases."""
        return float(np.max([phase.max_abs_logit_difference for phase in self.phases]))

    def problems(self) -> list[str]:
        """Say which promise was not kept in which phase; empty if all were."""
        found = []
        for phase in self.phases:
            if not phase.balancedness_after >= MIN_BALANCEDNESS:
                found.append(
                    f"{phase.traffic}: balancedness after balancing is {phase.balancedness_after:.3f}, "
                    f"less than {MIN_BALANCEDNESS}"
                )
            if not phase.max_abs_logit_difference < MAX_LOGIT_DIFFERENCE:
                found.append(
                    f"{phase.traffic}: logits differ from the unmodified model's by "
                    f"{phase.max_abs_logit_difference:.1e}, not less than {MAX_LOGIT_DIFFERENCE:.0e}"
                )
            if phase.requests_compared != phase.requests:
                found.append(
                    f"{phase.traffic}: {phase.requests_compared} of {phase.requests} requests were compared with the "
                    "unmodified model"
                )
        if self.kill_rank is not None and self.loss is None:
            found.append(f"no rank went on without rank {self.kill_rank}, so living through a loss was not shown")
        # Where one of two ranks is killed, each has a copy of everything from the beginning.
        can_move = self.kill_rank is None or self.topology.ep_size > 2
        if self.config.use_async and can_move and not any(phase.steps_during_moves for phase in self.phases):
            found.append("no batch was served while weights moved, so serving beside moves was not shown")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, figures over all phases first.

        The two balancedness figures treat the layers of all phases alike: sum of means / sum of maxima.
        """
        return {
            "ep_size": self.topology.ep_size,
            "slots_per_rank": self.topology.slots_per_rank,
            "policy": self.config.policy,
            "use_async": self.config.use_async,
            "step_interval": self.config.step_interval,
            "seed": self.seed,
            "balancedness_before": overall_balancedness([phase.rank_load_before for phase in self.phases]),
            "balancedness_after": overall_balancedness([phase.rank_load_after for phase in self.phases]),
            "max_abs_logit_difference": self.max_abs_logit_difference,
            "moved_experts": sum(phase.moved_experts for phase in self.phases),
            "bytes_moved": sum(phase.bytes_moved for phase in self.phases),
            "stall_ms": sum(phase.stall_ms for phase in self.phases),
            "decisions": dict(sum((Counter(phase.decisions) for phase in self.phases), Counter())),
            **_pace(self.phases),
            "seconds": self.seconds,
            "problems": self.problems(),
            "training": asdict(self.training),
            "loss": self._loss_to_json(),
            "phases": [phase.to_json() for phase in self.phases],
        }

    @property
    def loss_phase(self) -> PhaseResult | None:
        """The phase in which a rank was lost."""
        return next((phase for phase in self.phases if phase.around_loss is not None), None)

    def _loss_to_json(self) -> dict[str, Any] | None:
        if self.loss is None:
            return None
        phase, figures = self.loss_phase, self.loss.to_json()
        if phase is not None and phase.around_loss is not None:
            before, after = phase.around_loss
            figures |= {"balancedness_before": before, "balancedness_after": after}
            figures |= {"balancedness_in_the_end": phase.balancedness_after}
        return figures


def overall_balancedness(rank_loads: Sequence[Float[np.ndarray, "layers ep_size"]]) -> float:
    """Return the balancedness of all layers of all arrays: sum of means / sum of maxima."""
    layers = np.concatenate(rank_loads)
    return float(np.nanmean(layers, axis=1).sum() / np.nanmax(layers, axis=1).sum())


def median(values: Float[np.ndarray, " values"]) -> float:
    """Return the median, or NaN of none."""
    return float(np.median(values)) if values.size else float("nan")


def _pace(phases: Sequence[PhaseResult]) -> dict[str, Any]:
    """How many steps there were, and how long the median one took; None where there was none."""
    step_ms = np.concatenate([phase.step_ms for phase in phases])
    during_moves = np.concatenate([phase.during_moves for phase in phases])
    parts = {"idle": step_ms[~during_moves], "moving": step_ms[during_moves]}
    return {
        "steps": len(step_ms),
        "steps_during_moves": int(during_moves.sum()),
        "step_ms": {name: median(values) if values.size else None for name, values in parts.items()},
    }


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    plain = value.astype(object)
    plain[np.isnan(value)] = None
    return plain.tolist()
