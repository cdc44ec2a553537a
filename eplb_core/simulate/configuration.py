"""One way to run a load balancer: what is planned, from which estimate, how often, on which ranks."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from eplb_core._checks import EplbError, check_choice, check_count, check_kind, require, shown
from eplb_core.control import ControlConfig, ModelConfig
from eplb_core.costs import Costs
from eplb_core.load import Estimator, exponential_decay, last_value, sliding_window, trend_forecast
from eplb_core.placement import round_robin
from eplb_core.policies import POLICIES, rebalance
from eplb_core.topology import Topology, check_topology

STATIC = "static"
"""The policy that never rebalances."""

MODEL = "model"
"""What the controller calls the model of a trace."""

STARTS = ("round_robin", "even")

_ESTIMATORS: dict[str, tuple[Callable[..., Estimator], type | None]] = {
    "last": (last_value, None),
    "window": (sliding_window, int),
    "decay": (exponential_decay, float),
    "trend": (trend_forecast, int),
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What one replay runs. Hashable, and small enough to be sent to another process.

    Args:
        topology: ranks, slots and nodes.
        policy: a policy of `rebalance`; `"static"` keeps the start; or a function
            `(load, topology, previous) -> placement` of your own, in a module if other processes shall run it.
        estimator: what is planned for, from the windows so far: `"last"`, `"window:N"` (the sum of the last N),
            `"decay:H"` (half-life H), `"trend:N"` (a line through the last N). See `eplb_core.load`.
        interval: windows from one plan to the next, the first window included. None plans on the first window only.
        threshold: plan only where the estimate's balancedness, over all layers, is below this. None always plans.
        hysteresis: how far below the threshold it must fall before plans are made again.
        min_gain: share of the busiest ranks' load that a plan must take off to be carried out.
        horizon: carry a plan out only in those layers where it saves, in this many windows, `min_return` times the
            seconds that its migration costs. None carries it out everywhere.
        min_return: seconds saved for each second spent.
        start: the placement before the first plan: `"round_robin"`, or `"even"`, which spreads copies for equal loads.
        options: further arguments of `rebalance`, such as `{"max_moves": 8}`.

    Raises:
        EplbError: if an argument is out of range or unknown.

    >>> Configuration(Topology(8, 9), interval=4, options={"max_moves": 8}).label
    'incremental, every 4, max_moves=8'
    """

    topology: Topology
    policy: str | Callable[..., Any] = "incremental"
    estimator: str = "last"
    interval: int | None = 1
    threshold: float | None = None
    hysteresis: float = 0.0
    min_gain: float = 0.0
    horizon: int | None = None
    min_return: float = 1.0
    start: str = "round_robin"
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self):
        known = (*POLICIES, STATIC)
        check_topology(self.topology, "Configuration")
        require(
            callable(self.policy) or (isinstance(self.policy, str) and self.policy in known),
            f"`Configuration(policy=...)` must be one of {known} or a function",
            f"policy={shown(self.policy)}",
            "Check the spelling.",
        )
        if self.interval is not None:
            check_count(self.interval, "Configuration(interval=...)", 1, advice="Count windows; None plans once.")
        check_choice(self.start, STARTS, "Configuration(start=...)")
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        require(
            isinstance(pairs, tuple | Set) and all(_is_option(pair) for pair in pairs),
            "`Configuration(options=...)` must be arguments of `rebalance` by name",
            f"options={shown(self.options)}",
            "Use a dict such as {'max_moves': 8}.",
        )
        parse_estimator(self.estimator)
        self.control(1, last_value(), None, rebalance)
        object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))

    @property
    def policy_name(self) -> str:
        """The policy, or the name of the function."""
        return self.policy if isinstance(self.policy, str) else getattr(self.policy, "__name__", repr(self.policy))

    @property
    def label(self) -> str:
        """The policy and whatever differs from the defaults, sizes aside."""
        parts = [self.policy_name]
        if self.policy != STATIC:
            parts += [self.estimator] if self.estimator != "last" else []
            parts += {None: ["once"], 1: []}.get(self.interval, [f"every {self.interval}"])
            parts += [] if self.threshold is None else [f"below {self.threshold:g}"]
            parts += [f"by {self.hysteresis:g}"] if self.hysteresis else []
            parts += [f"gain {self.min_gain:g}"] if self.min_gain else []
            fold = f" {self.min_return:g}-fold" if self.min_return != 1 else ""
            parts += [] if self.horizon is None else [f"if paid{fold} in {self.horizon}"]
        parts += [f"{self.start} start"] if self.start != "round_robin" else []
        return ", ".join([*parts, *(f"{name}={value}" for name, value in self.options)])

    @property
    def gated(self) -> bool:
        """Whether plans may be refused."""
        return self.threshold is not None or self.min_gain > 0 or self.horizon is not None

    def is_due(self, window: int) -> bool:
        """Whether a plan is made once this window has been served."""
        if self.policy == STATIC:
            return False
        return window == 0 if self.interval is None else window % self.interval == 0

    def control(self, num_logical: int, estimator: Estimator, costs: Costs | None, planner: Any) -> ControlConfig:
        """The controller's configuration with one window as its step, for one model called `MODEL`."""
        model = ModelConfig(self.topology, num_logical, planner, estimator, None if self.horizon is None else costs)
        return ControlConfig(
            {MODEL: model},
            interval=self.interval or 2**31,
            first=1,
            threshold=1.0 if self.threshold is None else self.threshold,
            hysteresis=self.hysteresis,
            min_gain=self.min_gain,
            horizon=1 if self.horizon is None else self.horizon,
            min_return=self.min_return,
            window=1,
        )

    def first_placement(self, num_layers: int, num_logical: int) -> np.ndarray:
        """The placement before the first plan, int32 `[layers, slots]`."""
        if self.start == "round_robin":
            return round_robin(num_layers, num_logical, self.topology)
        equal = np.ones((1, num_logical), dtype=np.int64)
        return np.repeat(rebalance(equal, self.topology, policy="refined"), num_layers, axis=0)

    def plan(self, load: Any, previous: np.ndarray) -> np.ndarray:
        """Call the policy."""
        if callable(self.policy):
            return np.asarray(self.policy(load, self.topology, previous, **dict(self.options)), dtype=np.int32)
        return rebalance(load, self.topology, policy=self.policy, previous=previous, **dict(self.options))


def _is_option(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def parse_estimator(spec: str) -> Estimator:
    """Make the estimator that a specification such as `"window:4"` names.

    Raises:
        EplbError: if the name is unknown or the number is missing, superfluous or out of range.

    >>> parse_estimator("decay:2").estimate(parse_estimator("decay:2").init(1, 2)).tolist()
    [[0.0, 0.0]]
    """
    check_kind(spec, str, "Configuration(estimator=...)")
    name, colon, number = spec.partition(":")
    make, kind = _ESTIMATORS.get(name, (None, None))
    try:
        if make is not None and bool(colon) == (kind is not None):
            return make(kind(number)) if kind else make()
    except EplbError:
        raise
    except ValueError:
        pass
    raise EplbError(
        "`Configuration(estimator=...)` must be 'last', 'window:N', 'decay:H' or 'trend:N'; "
        f"got estimator={shown(spec)}. Give whole windows for N and a half-life in windows for H."
    )


def grid(topologies: Topology | Iterable[Topology], **choices: Any) -> tuple[Configuration, ...]:
    """Combine all choices: every topology with every policy, estimator and so on.

    Args:
        topologies: one, or several.
        choices: for arguments of `Configuration` a list of values, or a single value.

    Returns:
        Configurations; the last choice varies fastest.

    >>> [c.label for c in grid(Topology(8, 9), policy=["greedy", "incremental"], interval=[1, 8])]
    ['greedy', 'greedy, every 8', 'incremental', 'incremental, every 8']
    """
    topologies = [topologies] if isinstance(topologies, Topology) else topologies
    check_kind(topologies, Iterable, "grid(topologies=...)")
    values = [value if isinstance(value, list | tuple) else [value] for value in choices.values()]
    return tuple(
        Configuration(topology, **dict(zip(choices, chosen, strict=True)))
        for topology in topologies
        for chosen in product(*values)
    )
