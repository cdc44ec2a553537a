"""What an `ExpertBalancer` is told, in the words of engines' `eplb_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from eplb_core import Topology, rebalance
from eplb_core._checks import check_choice, check_count, check_kind, check_number, require
from eplb_core.control import ControlConfig, ModelConfig
from eplb_core.costs import Costs, Links
from eplb_core.load import Estimator, sliding_window
from eplb_core.policies import POLICIES

_SYNONYMS = {"default": "greedy"}  # vLLM's name for DeepSeek's algorithm


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Cadence, gates and limits of an `ExpertBalancer`. Equal on all ranks.

    The first seven fields have vLLM's names and meaning; `BalancerConfig.from_dict` takes them from an `eplb_config`.

    Args:
        window_size: steps before a decision whose load counts. Longer than `step_interval`, it covers the windows of
            several decisions, rounded up to whole intervals.
        step_interval: steps between decisions; the first comes after a quarter of it.
        num_redundant_experts: None, or slots per layer beyond one for each expert, to be checked against the topology.
        log_balancedness: whether to log how balanced the model really was. Costs a reduction of its own, on a
            transport of its own.
        log_balancedness_interval: steps between these reductions, and that each of them covers.
        use_async: move weights while the model serves. Else `step` does all of it in place.
        policy: of `rebalance`; `"default"` is vLLM's name for `"greedy"`.
        num_groups: groups of consecutive experts that the router limits to few nodes.
        max_moves, max_total_moves: limits of `rebalance` for `policy="incremental"`.
        threshold, hysteresis, min_gain, horizon, min_return: gates of `eplb_core.control.ControlConfig`.
        seconds_per_token: seconds that one expert takes for one token; None to rebalance whatever it costs. With it,
            moves are made only where they save more time than they take.
        links: bandwidths between ranks, for the price of moves. Later prices are corrected by what moves have taken.
        estimator: of load, one window per decision; by default the sum over `window_size` steps.
        timeout: seconds that one step between ranks may take before the others are given up.
        max_staging_bytes, checksum: as for `rearrange`.

    Raises:
        EplbError: if a field is out of range.
    """

    window_size: int = 1000
    step_interval: int = 3000
    num_redundant_experts: int | None = None
    log_balancedness: bool = False
    log_balancedness_interval: int = 1
    use_async: bool = True
    policy: str = "incremental"
    num_groups: int = 1
    max_moves: int | None = None
    max_total_moves: int | None = None
    threshold: float = 1.0
    hysteresis: float = 0.0
    min_gain: float = 0.0
    horizon: int | None = None
    min_return: float = 1.0
    seconds_per_token: float | None = None
    links: Links = Links()
    estimator: Estimator | None = None
    timeout: float = 60.0
    max_staging_bytes: int = 64 * 2**20
    checksum: bool = False

    def __post_init__(self):
        for name in ("window_size", "step_interval", "log_balancedness_interval", "max_staging_bytes", "num_groups"):
            check_count(getattr(self, name), f"BalancerConfig({name}=...)", 1, advice="Count steps, bytes or groups.")
        for name in ("num_redundant_experts", "max_moves", "max_total_moves"):
            if getattr(self, name) is not None:
                advice = "Use None for any number."
                check_count(getattr(self, name), f"BalancerConfig({name}=...)", 0, 2**30, advice)
        for name in ("log_balancedness", "use_async", "checksum"):
            check_kind(getattr(self, name), bool, f"BalancerConfig({name}=...)")
        check_choice(self.policy, (*POLICIES, *_SYNONYMS), "BalancerConfig(policy=...)")
        check_number(self.timeout, "BalancerConfig(timeout=...)", 1e-9, advice="Seconds; nothing here waits forever.")
        if self.seconds_per_token is not None:
            check_number(self.seconds_per_token, "BalancerConfig(seconds_per_token=...)", 0)
        check_kind(self.links, Links, "BalancerConfig(links=...)")
        check_kind(self.estimator, (Estimator, type(None)), "BalancerConfig(estimator=...)")
        self.control({})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BalancerConfig":
        """Build one from an engine's `eplb_config`, such as vLLM's.

        Raises:
            EplbError: naming every field that this library does not know, or one that is out of range.

        >>> BalancerConfig.from_dict({"window_size": 100, "step_interval": 300, "policy": "default"}).step_interval
        300
        """
        check_kind(values, Mapping, "BalancerConfig.from_dict(values=...)")
        known = [field.name for field in fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        require(
            not unknown,
            f"`BalancerConfig.from_dict(values=...)` knows the fields {known}",
            f"{unknown}",
            "Leave them out, or check the spelling.",
        )
        return cls(**values)

    @property
    def recorded_steps(self) -> int:
        """Steps before a decision in which load is recorded."""
        return min(self.window_size, self.step_interval)

    def control(self, models: Mapping[str, ModelConfig]) -> ControlConfig:
        """The controller's part of this."""
        return ControlConfig(
            models or {"main": ModelConfig(Topology(1, 1), 1)},
            interval=self.step_interval,
            threshold=self.threshold,
            hysteresis=self.hysteresis,
            min_gain=self.min_gain,
            horizon=self.horizon,
            min_return=self.min_return,
            window=self.recorded_steps,
        )

    def model(self, topology: Topology, num_logical: int, bytes_per_expert: int) -> ModelConfig:
        """The controller's part for one model.

        Raises:
            EplbError: if the topology does not have the redundant experts that this asks for, or the policy's options
                are out of range.
        """
        redundant = topology.num_slots - num_logical
        require(
            self.num_redundant_experts in (None, redundant),
            "`BalancerConfig(num_redundant_experts=...)` must be what the topology has",
            f"num_redundant_experts={self.num_redundant_experts}, num_slots={topology.num_slots}, "
            f"num_logical={num_logical}",
            f"Use {redundant}, or None.",
        )
        planner = partial(
            rebalance,
            policy=_SYNONYMS.get(self.policy, self.policy),
            num_groups=self.num_groups,
            max_moves=self.max_moves,
            max_total_moves=self.max_total_moves,
        )
        planner(np.zeros((1, num_logical), dtype=np.int64), topology)  # bad options are refused here, not at a decision
        estimator = self.estimator or sliding_window(-(-self.window_size // self.step_interval))
        costs = None
        if self.seconds_per_token is not None:
            costs = Costs(bytes_per_expert, self.seconds_per_token, links=self.links)
        return ModelConfig(topology, num_logical, planner, estimator, costs)
