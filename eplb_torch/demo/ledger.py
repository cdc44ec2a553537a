"""What a rank's balancer reports, kept for the demo's own figures."""

from collections import Counter, defaultdict

from eplb_torch.metrics import Metrics, NoMetrics


class Ledger:
    """`Metrics` that remembers what it is told, and tells others.

    Args:
        others: where everything goes besides, such as `BalancerMetrics`.

    Attributes:
        decisions: how many were made, by reason, since `begin`.
        seconds: how long each phase of rebalances took, by its name, since `begin`.
        predicted: balancedness predicted at the last decision since `begin` that planned a placement, or None.
    """

    def __init__(self, others: Metrics | None = None):
        self._others = NoMetrics() if others is None else others
        self.begin()

    def begin(self) -> None:
        """Forget all, as at the beginning of a phase of traffic."""
        self.decisions: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.predicted: float | None = None

    def observe_balancedness(self, model: str, now: float, predicted: float | None = None) -> None:
        """See `Metrics.observe_balancedness`."""
        self.predicted = self.predicted if predicted is None else predicted
        self._others.observe_balancedness(model, now, predicted)

    def count_decision(self, model: str, reason: str) -> None:
        """See `Metrics.count_decision`."""
        self.decisions[reason] += 1
        self._others.count_decision(model, reason)

    def observe_seconds(self, model: str, phase: str, seconds: float) -> None:
        """See `Metrics.observe_seconds`."""
        self.seconds[phase] += seconds
        self._others.observe_seconds(model, phase, seconds)

    def count_moves(self, model: str, experts: int, bytes_within_node: int, bytes_across_nodes: int) -> None:
        """See `Metrics.count_moves`."""
        self._others.count_moves(model, experts, bytes_within_node, bytes_across_nodes)

    def set_epoch(self, model: str, epoch: int) -> None:
        """See `Metrics.set_epoch`."""
        self._others.set_epoch(model, epoch)

    def observe_stall(self, seconds: float) -> None:
        """See `Metrics.observe_stall`."""
        self._others.observe_stall(seconds)
