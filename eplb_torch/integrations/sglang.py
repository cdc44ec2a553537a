"""SGLang 0.5.23: our policies in the place of its planner, `eplb_algorithms.rebalance_experts`.

SGLang's own machinery records the load, moves the weights and switches its maps. Its planner is not told the
placement in force; ours reads it from SGLang's metadata, and moves little. docs/sglang.md has the recipe.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Real
from torch import Tensor

from eplb_core import EMPTY, derive_maps
from eplb_core._checks import require
from eplb_torch.integrations._plan import check_options, plan
from eplb_torch.integrations._plugin import check_signature, check_version, options_from, swap

TESTED = ("0.5.23",)
OPTIONS = ("policy", "tolerance", "max_moves", "max_total_moves", "cross_node_cost", "risk")
VARIABLE = "EPLB_SGLANG"

Maps = tuple[Tensor, Tensor, Tensor]
"""`(physical_to_logical [layers, slots], logical_to_physical [layers, logical, copies], replica_count)`, int64."""

_ALGORITHMS = "sglang.srt.eplb.eplb_algorithms"
_LOCATION = "sglang.srt.eplb.expert_location"
_log = logging.getLogger(__name__)


def live_placement() -> Int[Tensor, "layers slots"] | None:
    """Read the placement in force from SGLang's metadata; None before the first one is set."""
    metadata = importlib.import_module(_LOCATION).get_global_expert_location_metadata()
    return None if metadata is None else metadata.physical_to_logical_map_cpu


def live_ranks(num_ranks: int) -> Bool[np.ndarray, " ranks"]:
    """Read from SGLang's elastic state which ranks are alive; all of them where it has none.

    Raises:
        EplbError: if SGLang knows fewer ranks.
    """
    state = importlib.import_module("sglang.srt.elastic_ep.elastic_ep").ElasticEPStateManager.instance()
    if state is None or state.active_ranks is None:
        return np.ones(num_ranks, dtype=bool)
    alive = state.active_ranks.cpu().numpy().astype(bool)
    require(
        len(alive) >= num_ranks,
        "SGLang's `active_ranks` must cover the ranks of the plan",
        f"{len(alive)} entries for {num_ranks} ranks",
        "Check num_physical_experts and num_local_physical_experts.",
    )
    return alive[:num_ranks]  # further entries are reserved for ranks that may join


def make_planner(
    policy: str = "incremental",
    *,
    placement: Callable[[], Tensor | None] = live_placement,
    ranks: Callable[[int], np.ndarray] = live_ranks,
    **options: Any,
) -> Callable[..., Maps]:
    """Make a function with the signature and results of SGLang's `rebalance_experts`.

    Args:
        policy: `"incremental"`, `"refined"` or `"greedy"`, which is SGLang's `deepseek` algorithm. Greedy gives its
            result wherever no two loads are equal and none exceeds 2^24; SGLang rounds larger ones.
        placement: returns the placement in force, or None. The default asks SGLang.
        ranks: returns which of so many ranks are alive; called for the `elasticity_aware` algorithms only. The
            default asks SGLang.
        options: `tolerance`, `max_moves`, `max_total_moves`, `cross_node_cost`, `risk` of `eplb_core.rebalance`.

    Returns:
        The function. Called again with the same arguments, the same one.

    Raises:
        EplbError: if an option is unknown or out of range.
    """
    check_options("make_planner", OPTIONS, {"policy": policy, **options})
    return _make(policy, placement, ranks, tuple(sorted(options.items())))


@lru_cache(maxsize=16)
def _make(policy, placement, ranks, fixed: tuple[tuple[str, Any], ...]) -> Callable[..., Maps]:
    options = {"policy": policy, **dict(fixed)}

    def rebalance_experts(
        tokens_per_expert: Real[Tensor, "*steps layers logical"],
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Maps:
        """Plan from the placement in force. `algorithm` says whether groups stay on nodes and dead ranks count.

        The results lie on the CPU. Where a rank is dead, groups are ignored, its slots name expert 0, as SGLang
        has it, and `logical_to_physical` has none of them.

        Raises:
            EplbError: if the slots do not split over the ranks, or those of the live ranks do not hold all experts.
        """
        num_ranks, rest = divmod(num_physical_experts, num_local_physical_experts)
        require(
            rest == 0,
            "SGLang's physical experts must split evenly over the ranks",
            f"num_physical_experts={num_physical_experts}, num_local_physical_experts={num_local_physical_experts}",
            f"Change --ep-num-redundant-experts by {-num_physical_experts % num_local_physical_experts}.",
        )
        load = tokens_per_expert if options.get("risk") else _summed(tokens_per_expert)
        alive = ranks(num_ranks) if algorithm.name.startswith("elasticity_aware") else np.ones(num_ranks, dtype=bool)
        grouped = algorithm.name.endswith("hierarchical")
        slots = np.repeat(alive, num_local_physical_experts)
        _check_capacity(load.shape[-1], slots, alive)
        held = placement()
        live = plan(
            load,
            None if held is None else _of(slots, held),
            num_slots=int(slots.sum()),
            num_ranks=int(alive.sum()),
            num_nodes=num_nodes if alive.all() else 1,  # what is left may be uneven, so groups are ignored
            num_groups=num_groups,
            options={**options, "hierarchy": "hierarchical" if grouped else "global"},
        )
        placed = np.full((live.shape[0], num_physical_experts), EMPTY, dtype=np.int64)
        placed[:, slots] = live
        return _maps(placed, load.shape[-1])

    return rebalance_experts


def _summed(tokens: Tensor) -> Tensor:
    """Sum the recorded steps where they are, so that one step's worth crosses to the host."""
    return tokens if tokens.ndim == 2 else tokens.sum(dim=0)


def _of(slots: Bool[np.ndarray, " slots"], placed: Tensor) -> Tensor:
    """The columns of live slots; `placed` may be of fewer or of more ranks."""
    return placed[:, : len(slots)][:, torch.from_numpy(slots[: placed.shape[1]])]


def _check_capacity(num_logical: int, slots: np.ndarray, alive: np.ndarray) -> None:
    require(
        slots.sum() >= num_logical,
        "SGLang's live ranks must have a slot for every expert",
        f"{num_logical} experts, {slots.sum()} slots on ranks {np.flatnonzero(alive).tolist()}",
        "Raise --ep-num-redundant-experts so that the loss of a rank leaves enough slots.",
    )


def _maps(placed: Int64[np.ndarray, "layers slots"], num_logical: int) -> Maps:
    maps = derive_maps(placed, num_logical)
    placed = np.where(placed == EMPTY, 0, placed)
    to_slots, count = (np.asarray(x).astype(np.int64) for x in (maps.logical_to_physical, maps.replica_count))
    return torch.from_numpy(placed), torch.from_numpy(to_slots), torch.from_numpy(count)


def install(policy: str = "incremental", *, force: bool = False, **options: Any) -> ExitStack:
    """Replace SGLang's planner in this process; call it before the first rebalance. Twice is the same as once.

    Args:
        policy: as in `make_planner`.
        force: accept a release of SGLang that this was not tested with.
        options: as in `make_planner`.

    Returns:
        A context manager; leaving it, or `close()`, restores SGLang's own planner. It may be ignored.

    Raises:
        EplbError: for an option that `make_planner` refuses, an untested release, or a planner with other parameters.
        ModuleNotFoundError: if SGLang is not installed.
    """
    ours = make_planner(policy, **options)
    check_version("sglang", TESTED, force)
    algorithms = importlib.import_module(_ALGORITHMS)
    theirs = algorithms.rebalance_experts
    check_signature(ours, theirs, "SGLang")
    undo = ExitStack()
    # 0.5.23 looks the function up in `eplb_algorithms`; other releases may have imported it by name.
    for module in (algorithms, sys.modules.get(_LOCATION)):
        if module is not None and vars(module).get("rebalance_experts") is theirs:
            undo.enter_context(swap(vars(module), "rebalance_experts", ours))
    _log.info("expert load balancing: SGLang's planner is now policy %r with %s", policy, options)
    return undo


def plugin() -> None:
    """Install the policy named by the environment variable `EPLB_SGLANG`, if it is set.

    Meant as an entry point of the group `sglang.srt.plugins`, which SGLang runs in every process. SGLang logs what a
    plugin raises and serves on without it.

    Raises:
        EplbError: as `install`, or if the variable cannot be read.
    """
    options = options_from(VARIABLE)
    if options is not None:
        install(**options)


__all__ = ("install", "live_placement", "live_ranks", "make_planner", "plugin")
