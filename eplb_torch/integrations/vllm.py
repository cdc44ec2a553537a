"""vLLM 0.32: our policies in the place of its expert load balancing policy.

vLLM's own machinery counts the load, moves the weights and switches its maps; only the decision where experts go is
replaced. Every rank plans by itself, as vLLM does it: the same load and placement give the same plan on every rank.
docs/vllm.md has the recipe.
"""

import importlib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from types import MappingProxyType, new_class
from typing import Any

import torch
from jaxtyping import Int64, Real
from torch import Tensor

from eplb_torch.integrations._plan import check_options, plan
from eplb_torch.integrations._plugin import check_signature, check_version, options_from, swap

TESTED = ("0.32.0",)
OPTIONS = ("policy", "hierarchy", "tolerance", "max_moves", "max_total_moves", "cross_node_cost")
VARIABLE = "EPLB_VLLM"

_log = logging.getLogger(__name__)


class _Policy:
    """A policy as vLLM wants it: a class that is never instantiated."""

    options: Mapping[str, Any]

    @classmethod
    def rebalance_experts(
        cls,
        weight: Real[Tensor, "layers logical"],
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Int64[Tensor, "layers old_slots"] | None = None,
    ) -> Int64[Tensor, "layers slots"]:
        """Compute the placement that vLLM shall bring about.

        Args:
            weight: tokens per expert, summed over vLLM's window and ranks. Integers are not rounded.
            num_replicas: slots of a layer, a multiple of `num_ranks`.
            num_groups: groups of experts; they are kept on nodes where they are a multiple of `num_nodes`.
            num_nodes: hosts; if they do not divide the ranks, one is assumed.
            num_ranks: ranks that shall hold experts. When vLLM scales down, the first ones.
            old_global_expert_indices: the placement in force, -1 where a rank that joins holds nothing yet. Slots of
                ranks that leave are at its end.

        Returns:
            `[layers, num_replicas]` on the CPU, an expert in every slot. Experts that stay on a rank keep their slot.

        Raises:
            EplbError: if the slots do not split over the ranks or do not hold all experts.
        """
        placed = plan(
            weight,
            old_global_expert_indices,
            num_slots=num_replicas,
            num_ranks=num_ranks,
            num_nodes=num_nodes,
            num_groups=num_groups,
            options=cls.options,
        )
        return torch.from_numpy(placed)


def make_policy(policy: str = "incremental", *, base: type = object, **options: Any) -> type:
    """Make a policy class with vLLM's interface and fixed options; it needs no vLLM to run.

    Args:
        policy: `"incremental"`, `"refined"`, or `"greedy"`, which is vLLM's own default policy. Greedy gives vLLM's
            result wherever no two loads are equal and none exceeds 2^24; vLLM rounds larger ones.
        base: a class to inherit from, such as vLLM's `AbstractEplbPolicy`.
        options: `hierarchy`, `tolerance`, `max_moves`, `max_total_moves`, `cross_node_cost` of
            `eplb_core.rebalance`. All ranks must use the same.

    Returns:
        A class with the classmethod `rebalance_experts`; the same one for the same arguments.

    Raises:
        EplbError: if an option is unknown or out of range.

    >>> load, old = torch.tensor([[90, 10, 10, 10]]), torch.tensor([[0, 1, 2, 3, 1, 2]])
    >>> make_policy().rebalance_experts(load, 6, 1, 1, 2, old)
    tensor([[0, 1, 2, 3, 0, 2]])
    """
    check_options("make_policy", OPTIONS, {"policy": policy, **options})
    return _make(policy, base, tuple(sorted(options.items())))


@lru_cache(maxsize=16)
def _make(policy: str, base: type, options: tuple[tuple[str, Any], ...]) -> type:
    fixed = {"options": MappingProxyType({"policy": policy, **dict(options)}), "__module__": __name__}
    return new_class(f"Eplb{policy.title()}Policy", (_Policy, base), {}, lambda namespace: namespace.update(fixed))


def register(policy: str = "incremental", *, name: str = "default", force: bool = False, **options: Any) -> ExitStack:
    """Put one of our policies into vLLM's registry, in this process; call it before the model is loaded.

    vLLM's configuration accepts no policy but `"default"`, and asynchronous rearrangement requires that one, so by
    default ours takes its name. Registering the same twice changes nothing.

    Args:
        policy: as in `make_policy`.
        name: key in the registry. Under another name than `"default"` the policy must be selected by assigning
            `eplb_config.policy` after the configuration was validated.
        force: accept a release of vLLM that this was not tested with.
        options: as in `make_policy`.

    Returns:
        A context manager; leaving it, or `close()`, restores what was registered before. It may be ignored.

    Raises:
        EplbError: for an option that `make_policy` refuses, an untested release, or a policy interface that differs.
        ModuleNotFoundError: if vLLM is not installed.
    """
    make_policy(policy, **options)
    check_version("vllm", TESTED, force)
    registry = importlib.import_module("vllm.distributed.eplb.policy")
    ours = make_policy(policy, base=registry.AbstractEplbPolicy, **options)
    check_signature(_Policy.rebalance_experts, registry.AbstractEplbPolicy.rebalance_experts, "vLLM")
    _log.info("expert load balancing: policy %r of vLLM is now %s with %s", name, ours.__name__, options)
    return swap(registry.EPLB_POLICIES, name, ours)


def plugin() -> None:
    """Register the policy named by the environment variable `EPLB_VLLM`, if it is set.

    Meant as an entry point of the group `vllm.general_plugins`, which vLLM runs in every process, workers included.

    Raises:
        EplbError: as `register`, or if the variable cannot be read; vLLM then does not start.
    """
    options = options_from(VARIABLE)
    if options is not None:
        register(**options)


__all__ = ("make_policy", "plugin", "register")
