"""What a controller is told once: models, cadence and gates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eplb_core._checks import MOST_EXPERTS, check_count, check_kind, check_number, require
from eplb_core.costs import Costs
from eplb_core.load import Estimator, last_value
from eplb_core.policies import rebalance
from eplb_core.topology import Topology, check_topology


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model under control.

    Args:
        topology: ranks and slots.
        num_logical: experts of each layer.
        planner: `(load, topology, *, previous) -> placement`; `functools.partial(rebalance, policy=...)`, or an
            engine's own.
        estimator: what to expect from the windows seen.
        costs: prices of serving and moving; without them moves are free and `ControlConfig.min_return` does nothing.

    Raises:
        EplbError: if an argument is of another kind.
    """

    topology: Topology
    num_logical: int
    planner: Callable[..., Any] = rebalance
    estimator: Estimator = last_value()
    costs: Costs | None = None

    def __post_init__(self):
        check_topology(self.topology, "ModelConfig")
        check_count(self.num_logical, "ModelConfig(num_logical=...)", 1, MOST_EXPERTS)
        check_kind(self.planner, Callable, "ModelConfig(planner=...)")
        check_kind(self.estimator, Estimator, "ModelConfig(estimator=...)")
        check_kind(self.costs, (Costs, type(None)), "ModelConfig(costs=...)")


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """When models are rebalanced. Static: equal on all ranks, and constant.

    Args:
        models: by name, such as `"main"` and `"draft"`; they share one cadence.
        interval: steps between decisions, >= 1.
        first: steps before the first decision, >= 1; a quarter of the interval by default, as traffic has not been
            seen by the initial placement.
        threshold: balancedness from which on nothing is done, in (0, 1]; 1 to always look for a better placement.
        hysteresis: how far balancedness must fall below the threshold before something is done; from then on
            decisions act until the threshold is reached again. In [0, threshold).
        min_gain: least share of the busiest ranks' load, summed over layers, that a new placement must take off,
            in [0, 1).
        horizon: steps for which a new placement is expected to serve; the interval by default.
        min_return: seconds that serving must save over the horizon for each second that moving costs, >= 0. A layer
            that does not earn its share of the cost stays as it is.
        window: steps whose load one call of `observe` brings; the interval by default.

    Raises:
        EplbError: if a figure is out of range.
    """

    models: Mapping[str, ModelConfig]
    interval: int = 3000
    first: int | None = None
    threshold: float = 1.0
    hysteresis: float = 0.0
    min_gain: float = 0.0
    horizon: int | None = None
    min_return: float = 1.0
    window: int | None = None

    def __post_init__(self):
        check_kind(self.models, Mapping, "ControlConfig(models=...)")
        for name, model in self.models.items():
            check_kind(name, str, "ControlConfig(models={name: ...})")
            check_kind(model, ModelConfig, "ControlConfig(models={...: model})")
        require(len(self.models) >= 1, "`ControlConfig(models=...)` must name a model", "none", "Name one, say 'main'.")
        check_count(self.interval, "ControlConfig(interval=...)", 1, advice="It counts steps.")
        for name, value in (("first", self.first), ("horizon", self.horizon), ("window", self.window)):
            if value is not None:
                check_count(value, f"ControlConfig({name}=...)", 1, advice="It counts steps.")
        check_range("threshold", self.threshold, 0, 1, "balancedness")
        check_range("hysteresis", self.hysteresis, 0, self.threshold, "balancedness")
        check_range("min_gain", self.min_gain, 0, 1, "of the busiest ranks' load")
        check_range("min_return", self.min_return, 0, float("inf"), "seconds saved per second spent")

    @property
    def first_step(self) -> int:
        """Steps before the first decision."""
        return max(self.interval // 4, 1) if self.first is None else self.first

    @property
    def horizon_steps(self) -> int:
        """Steps for which a new placement is expected to serve."""
        return self.interval if self.horizon is None else self.horizon

    @property
    def window_steps(self) -> int:
        """Steps whose load one call of `observe` brings."""
        return self.interval if self.window is None else self.window


def check_range(
    name: str, value: int | float, least: int | float, most: int | float, unit: str, where: str = "ControlConfig"
) -> None:
    """Refuse a figure outside `least..most`, NaN and infinity included."""
    check_number(value, f"{where}({name}=...)", least, most, f"It counts {unit}.")
