"""What a balancer tells of its work: to metrics, and to the log."""

import logging
from collections.abc import Iterable

from eplb_torch.balancer.planning import Outcome
from eplb_torch.live_model import ServedModel
from eplb_torch.metrics import Metrics

logger = logging.getLogger("eplb_torch.balancer")


class Account:
    """Turns what has happened into figures and lines.

    Args:
        metrics: where figures go.
        rank: of this process; only rank 0 logs decisions, as they are the same on all.
    """

    def __init__(self, metrics: Metrics, rank: int):
        self.metrics = metrics
        self._rank = rank
        self._received: dict[str, tuple[int, int]] = {}
        self._move_seconds: dict[str, float] = {}

    def decided(self, outcome: Outcome, step: int) -> None:
        """Tell of a decision for every model."""
        self._received = outcome.received
        for name, decision in outcome.decisions.items():
            self.metrics.count_decision(name, decision.reason.value)
            self.metrics.observe_seconds(name, "planning", outcome.seconds)
            if decision.balancedness is not None:
                self.metrics.observe_balancedness(name, decision.balancedness, decision.predicted_balancedness)
            if self._rank == 0:
                logger.info("step %d, %s: %s", step, name, decision.in_words())

    def switched(self, name: str, epoch: int, seconds: float) -> None:
        """Tell that layers of a model were committed."""
        self.metrics.observe_seconds(name, "commit", seconds)
        self.metrics.set_epoch(name, epoch)

    def waited(self, seconds: float) -> None:
        """Tell that the serving thread had to wait."""
        if seconds:
            self.metrics.observe_stall(seconds)

    def moved(self, name: str, model: ServedModel, seconds: float) -> None:
        """Tell that all moves of a model are done."""
        self._move_seconds[name] = seconds
        self.metrics.observe_seconds(name, "prepare", seconds)
        (within, across), size = self._received[name], row_bytes(model)
        self.metrics.count_moves(name, within + across, within * size, across * size)

    def take_move_seconds(self) -> dict[str, float]:
        """Hand out how long the moves of each model took since this was last asked."""
        seconds, self._move_seconds = self._move_seconds, {}
        return seconds

    def failed(self, names: Iterable[str], error: Exception, *, ended: bool) -> None:
        """Tell that a decision or its moves failed."""
        for name in names:
            self.metrics.count_decision(name, "failed")
        outcome = "ended" if ended else "failed, and will be tried again"
        logger.error("rank %d: balancing %s: %s", self._rank, outcome, error)


def row_bytes(model: ServedModel) -> int:
    """Bytes of an expert in the layer where it has most."""
    return max(model.weights.row_bytes(layer) for layer in range(model.weights.num_layers))
