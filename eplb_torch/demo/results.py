"""What a run of the demo found, and whether it kept its promises."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from eplb_core import Topology

MIN_BALANCEDNESS = 0.85
MAX_LOGIT_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One kind of traffic, served before and after its experts were moved.

    "Before" is measured under the placement that the phase found, "after" under the new one and on new tokens.

    traffic: what was served.
    tokens: served before; as many were served after.
    balancedness_before, balancedness_after: sum of the layers' mean rank loads / sum of their maxima.
    rank_load_before, rank_load_after: `[layers, ep_size]` tokens per rank, each counted once for each of its experts.
    moved_experts: (layer, rank, expert) that a rank received.
    bytes_moved: payload between processes.
    planning_ms, moving_ms: milliseconds on the slowest rank.
    max_abs_logit_difference: from the unmodified model, over every logit of the phase.
    """

    traffic: str
    tokens: int
    balancedness_before: float
    balancedness_after: float
    rank_load_before: Float[np.ndarray, "layers ep_size"]
    rank_load_after: Float[np.ndarray, "layers ep_size"]
    moved_experts: int
    bytes_moved: int
    planning_ms: float
    moving_ms: float
    max_abs_logit_difference: float


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
    policy: of `rebalance`.
    seed: of corpus, model and training.
    training: how the model came about.
    phases: what was served, in order.
    seconds: wall-clock time of the run.
    """

    topology: Topology
    policy: str
    seed: int
    training: TrainingResult
    phases: tuple[PhaseResult, ...]
    seconds: float

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
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, figures over all phases first.

        The two balancedness figures treat the layers of all phases alike: sum of means / sum of maxima.
        """
        return {
            "ep_size": self.topology.ep_size,
            "slots_per_rank": self.topology.slots_per_rank,
            "policy": self.policy,
            "seed": self.seed,
            "balancedness_before": _overall([phase.rank_load_before for phase in self.phases]),
            "balancedness_after": _overall([phase.rank_load_after for phase in self.phases]),
            "max_abs_logit_difference": self.max_abs_logit_difference,
            "moved_experts": sum(phase.moved_experts for phase in self.phases),
            "bytes_moved": sum(phase.bytes_moved for phase in self.phases),
            "seconds": self.seconds,
            "problems": self.problems(),
            "training": asdict(self.training),
            "phases": [_plain(phase) for phase in self.phases],
        }


def _overall(rank_loads: list[np.ndarray]) -> float:
    layers = np.concatenate(rank_loads)
    return float(layers.mean(axis=1).sum() / layers.max(axis=1).sum())


def _plain(phase: PhaseResult) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(phase).items()}
