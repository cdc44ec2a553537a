"""The peers' released planners, as plain functions.

Nothing of theirs is part of this project: their releases are downloaded on first use, and only their load
balancing files are read. Every function raises `PeerUnavailable` where that is not possible, so that tests
and benchmarks can skip.

Functions named after a peer's own return its own entry points, unchanged, for torch tensors. `*_plan` take
NumPy loads and placements, and return a NumPy `physical_to_logical`.
"""

import importlib.util
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.released import PeerUnavailable, StandIn, fetch, installed, load

__all__ = (
    "PeerUnavailable",
    "RankPlan",
    "ascend_flashlb",
    "ascend_swift",
    "flashlb_plan",
    "sglang_deepseek",
    "sglang_deepseek_vec",
    "sglang_installed",
    "swift_plan",
    "vllm_compute_logical_maps",
    "vllm_config",
    "vllm_installed",
    "vllm_plan",
    "vllm_plan_rank",
    "vllm_policy",
    "vllm_ranks_with_experts",
    "vllm_schedule_migration_batches",
    "vllm_schedule_migration_batches_for_layers",
)

VLLM = ("vllm-tpu==0.32.0", "vllm/distributed/eplb")
SGLANG = ("sglang==0.5.23", "sglang/srt/eplb")
VLLM_CONFIG = (VLLM[0], "vllm/config")
ASCEND = ("vllm-ascend==0.23.0.post1", "vllm_ascend/eplb/core/policy")


@cache
def _vllm() -> SimpleNamespace:
    names = (
        "policy.abstract",
        "policy.default",
        "eplb_utils",
        "migration_scheduler",
        "rebalance_execute",
        "eplb_state",
    )
    replace = {name: StandIn(name) for name in ("vllm.config", "vllm.config.utils", "vllm.config.parallel")}
    modules = load(fetch(*VLLM), [f"vllm.distributed.eplb.{name}" for name in names], replace=replace)
    return SimpleNamespace(**dict(zip([name.rpartition(".")[2] for name in names], modules, strict=True)))


def vllm_installed(
    replace: Mapping[str, ModuleType] | None = None, *, version: str = "0.32.0", run: Collection[str] = ()
) -> AbstractContextManager[None]:
    """While it lasts, `import vllm.distributed.eplb...` finds what was released, with its registry of policies.

    The rest of vLLM says that there is no accelerator to pin memory for and no elastic group.

    Args:
        replace: further stand-ins, such as one for `vllm.distributed.parallel_state`.
        version: what `vllm.__version__` says.
        run: further packages of which the `__init__` file is run.
    """
    standing = (
        StandIn("vllm", __version__=version),
        StandIn("vllm.config"),
        StandIn("vllm.config.utils"),
        StandIn("vllm.config.parallel", EPLBPolicyOption=Literal["default"]),
        StandIn("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=type("_None", (), {})),
        StandIn("vllm.platforms", current_platform=SimpleNamespace(is_rocm=lambda: False)),
        StandIn("vllm.utils.torch_utils", PIN_MEMORY=False),
    )
    replace = {module.__name__: module for module in standing} | dict(replace or {})
    return installed(fetch(*VLLM), "vllm", replace=replace, run=("vllm.distributed.eplb.policy", *run))


def vllm_config() -> ModuleType:
    """`vllm.config.parallel`; it needs pydantic and regex."""
    return load(fetch(*VLLM_CONFIG), ["vllm.config.parallel"])[0]


def vllm_policy() -> type:
    """`DefaultEplbPolicy`; its `rebalance_experts` takes and returns torch tensors."""
    return _vllm().default.DefaultEplbPolicy


def vllm_compute_logical_maps():
    """`compute_logical_maps(physical_to_logical, num_logical) -> (logical_to_physical, replica_count)`."""
    return _vllm().eplb_state.compute_logical_maps


def vllm_ranks_with_experts():
    """`get_ep_ranks_with_experts_batch(experts, slots_per_rank, old, new) -> (senders, receivers)`."""
    return _vllm().rebalance_execute.get_ep_ranks_with_experts_batch


def vllm_schedule_migration_batches():
    """`schedule_migration_batches(slots_per_rank, old, new)` of one layer."""
    return _vllm().migration_scheduler.schedule_migration_batches


def vllm_schedule_migration_batches_for_layers():
    """`schedule_migration_batches_for_layers(slots_per_rank, old, new)`."""
    return _vllm().migration_scheduler.schedule_migration_batches_for_layers


class RankPlan(NamedTuple):
    """What vLLM makes one rank do for one layer.

    sends: (expert, destination rank) in the order posted.
    recvs: (expert, source rank) in the order posted.
    metadata: vLLM's `TransferMetadata`.
    """

    sends: list[tuple[int, int]]
    recvs: list[tuple[int, int]]
    metadata: object


def vllm_plan_rank(old: np.ndarray, new: np.ndarray, slots_per_rank: int, ep_rank: int) -> RankPlan:
    """Run vLLM's `move_to_buffer` for one layer and one rank with no tensors: what is left of it is its
    planning.

    Args:
        old: `[slots]` logical expert of each slot, -1 for none.
        new: `[slots]`.
    """
    plan = RankPlan([], [], None)
    recorder = SimpleNamespace(
        set_transfer_context=lambda *_: None,
        add_send=lambda tensors, dst_rank, expert_id: plan.sends.append((expert_id, dst_rank)),
        add_recv=lambda tensors, src_rank, expert_id: plan.recvs.append((expert_id, src_rank)),
        execute=lambda: None,
    )
    metadata = _vllm().rebalance_execute.move_to_buffer(slots_per_rank, old, new, [], [], None, ep_rank, recorder)
    return plan._replace(metadata=metadata)


def vllm_plan(load, num_slots, ep_size, *, previous=None, num_groups=1, num_nodes=1) -> np.ndarray:
    """`[layers, slots]` by vLLM's default policy; with `previous`, experts keep their slot if they stay."""
    import torch

    old = None if previous is None else torch.from_numpy(np.asarray(previous, dtype=np.int64))
    weight = torch.from_numpy(np.asarray(load))
    return vllm_policy().rebalance_experts(weight, num_slots, num_groups, num_nodes, ep_size, old).numpy()


@cache
def _sglang() -> tuple[ModuleType, ...]:
    return tuple(
        load(
            fetch(*SGLANG),
            [f"sglang.srt.eplb.eplb_algorithms.{name}" for name in ("deepseek", "deepseek_vec")],
        )
    )


def sglang_deepseek():
    """`rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, enable_hierarchical)`."""
    return _sglang()[0].rebalance_experts


def sglang_deepseek_vec():
    """`rebalance_experts(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_groups,
    num_nodes, enable_hierarchical)`, with tokens `[steps, layers, logical]`.
    """
    return _sglang()[1].rebalance_experts


def sglang_installed(
    replace: Mapping[str, ModuleType] | None = None, *, version: str = "0.5.23", run: Collection[str] = ()
) -> AbstractContextManager[None]:
    """While it lasts, `import sglang.srt.eplb...` finds what was released, with its choice of algorithms.

    Args:
        replace: further stand-ins, such as one for `sglang.srt.runtime_context`.
        version: what `sglang.__version__` says.
        run: further packages of which the `__init__` file is run.
    """
    replace = {"sglang": StandIn("sglang", __version__=version), "einops": StandIn("einops")} | dict(replace or {})
    return installed(fetch(*SGLANG), "sglang", replace=replace, run=("sglang.srt.eplb.eplb_algorithms", *run))


@cache
def _ascend(name: str) -> ModuleType:
    """vLLM Ascend publishes a source distribution only.

    FlashLB runs through numba where that is installed, and as plain Python, much slower, where it is not.
    """
    replace = {"torch_npu": StandIn("torch_npu")}
    if importlib.util.find_spec("numba") is None:
        replace["numba"] = StandIn("numba", njit=_njit)
    root = fetch(*ASCEND, sdist=True)
    # `vllm.logger` is a package of the same engine: not installed here, and mocked if it were.
    replace |= {"vllm": StandIn("vllm"), "vllm.logger": StandIn("vllm.logger")}
    return load(root, [f"vllm_ascend.eplb.core.policy.{name}"], replace=replace)[0]


def _njit(function=None, **_):
    return function if function is not None else lambda function: function


def ascend_swift(devices_per_host: int = 8):
    """A new `SwiftBalanceEplb`: `rebalance_experts(placement, slot_load)`, both `[layers, ranks, slots]`."""
    module = _ascend("policy_swift_balancer")
    module.torch = SimpleNamespace(npu=SimpleNamespace(device_count=lambda: devices_per_host))
    return module.SwiftBalanceEplb()


def ascend_flashlb(ep_size: int = 32):
    """A new `FlashLB`, with slot loads `[windows, layers, ranks, slots]`; it keeps a history."""
    module = _ascend("policy_flashlb")
    module.get_dynamic_eplb_group = lambda: SimpleNamespace(world_size=ep_size)
    return module.FlashLB()


def swift_plan(policy, load, ep_size: int, previous) -> np.ndarray:
    """`[layers, slots]` placement that SwiftBalancer makes of `previous` for `load [layers, logical]`."""
    import torch

    table, slot_load = _per_slot(load, ep_size, previous)
    _, _, new = policy.rebalance_experts(torch.from_numpy(table), torch.from_numpy(slot_load))
    return np.asarray(new, dtype=np.int64).reshape(previous.shape)


def flashlb_plan(policy, load, ep_size: int, previous) -> np.ndarray:
    """`[layers, slots]` placement that FlashLB makes of `previous` for `load [windows, layers, logical]`.

    Every layer is taken, as its own runtime does, which discards the policy's list of layers worth changing.
    """
    table, slot_load = _per_slot(load, ep_size, previous)
    _, _, new = policy.rebalance_experts(table, slot_load)
    return np.asarray(new, dtype=np.int64).reshape(previous.shape)


def _per_slot(load, ep_size: int, previous) -> tuple[np.ndarray, np.ndarray]:
    """Ascend's policies want a table per rank, and the load of each slot: a copy's share of its expert's."""
    previous = np.asarray(previous, dtype=np.int64)
    load = np.asarray(load, dtype=np.float64)
    replicas = (previous[:, :, None] == np.arange(load.shape[-1])).sum(axis=1)
    slots = np.broadcast_to(previous, load.shape[:-1] + previous.shape[-1:])
    share = np.take_along_axis(load / replicas, slots, axis=-1)
    return previous.reshape(len(previous), ep_size, -1), share.reshape(*share.shape[:-1], ep_size, -1)
