"""What the balancer does, for Prometheus."""

import importlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from eplb_core._checks import EplbError, check_kind, listing, require, shown

REASONS = ("not_due", "balanced", "not_worth_it", "rebalance", "failed")
"""Why a decision was made, as in `eplb_core.control.Reason`; `failed` is a rebalance that was not carried out."""

PHASES = ("planning", "prepare", "commit")
"""Parts of a rebalance whose seconds are observed."""

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_JOIN_SECONDS = 10.0
_ONE = 1 + 1e-6  # a mean of floats may be rounded above their maximum


class Metrics(Protocol):
    """What a balancer reports. `model` is a name given to `BalancerMetrics`."""

    def observe_balancedness(self, model: str, now: float, predicted: float | None = None) -> None:
        """Balancedness of the last window, 0 to 1, and what the placement decided on is predicted to have, if known."""
        ...

    def count_decision(self, model: str, reason: str) -> None:
        """One decision, for one of `REASONS`."""
        ...

    def observe_seconds(self, model: str, phase: str, seconds: float) -> None:
        """How long one of `PHASES` took."""
        ...

    def count_moves(self, model: str, experts: int, bytes_within_node: int, bytes_across_nodes: int) -> None:
        """Experts that ranks have received, and the bytes of their weights by how far they came."""
        ...

    def set_epoch(self, model: str, epoch: int) -> None:
        """The epoch of the placement in force."""
        ...

    def observe_stall(self, seconds: float) -> None:
        """How long serving has waited for a rebalance."""
        ...


class NoMetrics:
    """`Metrics` for nobody: accepts everything, keeps nothing and needs no Prometheus."""

    def observe_balancedness(self, model: str, now: float, predicted: float | None = None) -> None:
        """Do nothing."""

    def count_decision(self, model: str, reason: str) -> None:
        """Do nothing."""

    def observe_seconds(self, model: str, phase: str, seconds: float) -> None:
        """Do nothing."""

    def count_moves(self, model: str, experts: int, bytes_within_node: int, bytes_across_nodes: int) -> None:
        """Do nothing."""

    def set_epoch(self, model: str, epoch: int) -> None:
        """Do nothing."""

    def observe_stall(self, seconds: float) -> None:
        """Do nothing."""


class MetricsServer(NamedTuple):
    """A running metrics server.

    port: where it listens.
    close: stops it and waits for its thread; may be called again.
    """

    port: int
    close: Callable[[], None]


class BalancerMetrics:
    """`Metrics` as Prometheus series, all of which exist from the start.

    Their number depends on the models alone, about 60 for each, and never on experts, layers or ranks: a value for
    an unknown model, reason or phase is an error, not a new series. They are of this process. To export every rank,
    tell them apart by a label; to export one, give the others `NoMetrics`.

        eplb_balancedness_ratio, eplb_predicted_balancedness_ratio, eplb_epoch
        eplb_decisions_total{reason}
        eplb_phase_seconds{phase}, eplb_stall_seconds        histograms; stalls are of the process, without a model
        eplb_moved_experts_total, eplb_moved_bytes_total{scope="within_node" or "across_nodes"}

    Args:
        models: names of the balanced models: the values of the label `model`.
        registry: a `prometheus_client.CollectorRegistry` to join, such as `prometheus_client.REGISTRY`; by default a
            new one of its own.
        labels: further labels of all series, and their values.

    Attributes:
        registry: where the series are.

    Raises:
        EplbError: if prometheus_client is not installed, there is no model or one is named twice, or a label has a
            name that is taken.

    >>> metrics = BalancerMetrics(["main"], labels={"ep_rank": "3"})
    >>> metrics.count_decision("main", "balanced")
    >>> labels = {"model": "main", "ep_rank": "3", "reason": "balanced"}
    >>> metrics.registry.get_sample_value("eplb_decisions_total", labels)
    1.0
    """

    def __init__(
        self, models: Sequence[str] = ("main",), registry: Any = None, labels: Mapping[str, str] | None = None
    ):
        prometheus = _prometheus()
        check_kind(models, Collection, "BalancerMetrics(models=...)")
        for name in models:
            check_kind(name, str, "BalancerMetrics(models=[name])")
        check_kind(labels, (Mapping, type(None)), "BalancerMetrics(labels=...)")
        require(
            registry is None or callable(getattr(registry, "register", None)),
            "`BalancerMetrics(registry=...)` must be a CollectorRegistry of prometheus_client",
            shown(registry),
            "Leave it out for one of its own.",
        )
        fixed = dict(labels or {})
        taken = sorted({"model", "reason", "phase", "scope", "le"} & set(fixed))
        require(
            not isinstance(models, str) and 0 < len(models) == len(set(models)) and not taken,
            "`BalancerMetrics` needs models with different names, and labels other than its own",
            f"models={models!r}, taken labels {taken}",
            "Name each model once; rename the labels.",
        )
        self._models = tuple(models)
        self.registry = prometheus.CollectorRegistry() if registry is None else registry

        def make(kind, name: str, text: str, values: Sequence[str] = (), label: str = "", **options):
            """The series of every model and value of `label`, by (model, value)."""
            names = (*fixed, "model", *([label] if label else []))
            family = kind(name, text, names, registry=self.registry, **options)
            return {
                (model, value): family.labels(**fixed, model=model, **({label: value} if label else {}))
                for model in self._models
                for value in (values if label else ("",))
            }

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        self._now = make(gauge, "eplb_balancedness_ratio", "Mean over busiest rank load in the last window")
        self._predicted = make(
            gauge, "eplb_predicted_balancedness_ratio", "Balancedness predicted for the placement decided on"
        )
        self._epoch = make(gauge, "eplb_epoch", "Epoch of the placement in force")
        self._decisions = make(counter, "eplb_decisions_total", "Decisions of the controller", REASONS, "reason")
        self._seconds = make(
            histogram, "eplb_phase_seconds", "Seconds per phase of a rebalance", PHASES, "phase", buckets=_SECONDS
        )
        self._experts = make(counter, "eplb_moved_experts_total", "Experts that ranks have received")
        self._bytes = make(counter, "eplb_moved_bytes_total", "Bytes sent", ("within_node", "across_nodes"), "scope")
        text = "Seconds that serving waited for a rebalance"
        stalls = histogram("eplb_stall_seconds", text, tuple(fixed), registry=self.registry, buckets=_SECONDS)
        self._stalls = stalls.labels(**fixed) if fixed else stalls
        for series in (*self._now.values(), *self._predicted.values()):
            series.set(math.nan)  # until there is a figure

    def observe_balancedness(self, model: str, now: float, predicted: float | None = None) -> None:
        """Balancedness of the last window, 0 to 1, and what the placement decided on is predicted to have, if known."""
        series = self._find(self._now, model)
        series.set(_checked("balancedness", now, _ONE))
        if predicted is not None:
            self._find(self._predicted, model).set(_checked("predicted balancedness", predicted, _ONE))

    def count_decision(self, model: str, reason: str) -> None:
        """One decision, for one of `REASONS`."""
        self._find(self._decisions, model, reason).inc()

    def observe_seconds(self, model: str, phase: str, seconds: float) -> None:
        """How long one of `PHASES` took."""
        self._find(self._seconds, model, phase).observe(_checked("seconds", seconds))

    def count_moves(self, model: str, experts: int, bytes_within_node: int, bytes_across_nodes: int) -> None:
        """Experts that ranks have received, and the bytes of their weights by how far they came."""
        amounts = [
            (self._find(self._experts, model), _checked("experts", experts)),
            (self._find(self._bytes, model, "within_node"), _checked("bytes_within_node", bytes_within_node)),
            (self._find(self._bytes, model, "across_nodes"), _checked("bytes_across_nodes", bytes_across_nodes)),
        ]
        for series, amount in amounts:
            series.inc(amount)

    def set_epoch(self, model: str, epoch: int) -> None:
        """The epoch of the placement in force."""
        self._find(self._epoch, model).set(_checked("epoch", epoch))

    def observe_stall(self, seconds: float) -> None:
        """How long serving has waited for a rebalance."""
        self._stalls.observe(_checked("seconds", seconds))

    def serve(self, port: int = 0, addr: str = "127.0.0.1") -> MetricsServer:
        """Serve the registry over HTTP from a thread of its own, at any path.

        Args:
            port: where to listen; 0 takes a free one.
            addr: address to listen on; by default only this machine can connect.

        Returns:
            The port, and what stops the server.

        Raises:
            OSError: if the port is taken or the address is not of this machine.
        """
        server, thread = _prometheus().start_http_server(port, addr=addr, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(_JOIN_SECONDS)

        return MetricsServer(server.server_port, close)

    def _find(self, series: dict[tuple[str, str], Any], model: str, value: str = "") -> Any:
        found = series.get((model, value))
        if found is None:
            values = sorted({known for _, known in series} - {""})
            raise EplbError(
                f"`BalancerMetrics` has series for the models {listing(self._models)}"
                + (f" and the values {listing(values)}" if values else "")
                + f"; got {model!r}"
                + (f" and {value!r}" if values else "")
                + ". Name every model when making it."
            )
        return found


def _checked(name: str, value: float, most: float = math.inf) -> float:
    require(
        math.isfinite(value) and 0 <= value <= most,
        f"`BalancerMetrics` takes a {name} that is finite, >= 0" + (f" and <= {most}" if most < math.inf else ""),
        f"{name}={value}",
        "Check how it is computed.",
    )
    return value


def _prometheus() -> Any:
    try:
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise EplbError(
            "`BalancerMetrics` needs prometheus_client; got none installed. Run `pip install 'eplb[metrics]'`, or use "
            "NoMetrics."
        ) from error
