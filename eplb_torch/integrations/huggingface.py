"""Run transformers MoE models expert-parallel, with redundant experts that move while the model serves.

Goes by the structure of the model alone: any family of transformers 5 whose experts module stacks its experts in
tensors `[num_experts, ...]` and is called with `(hidden_states, top_k_index, top_k_weights)`. The router, the
attention and the arithmetic of an expert stay the model's own; only the place where an expert is computed changes.

    topology = Topology.from_experts(num_logical=64, ep_size=dist.get_world_size(), num_redundant=16)
    experts = expert_parallel(model, topology)
    with torch.no_grad():
        logits = model(input_ids).logits

    load = experts.load()
    dist.all_reduce(load)
    new = rebalance(load.numpy(), topology, previous=experts.placement)
    plan = plan_moves(experts.placement, new, topology)
    rearrange(experts.weights, plan, topology, ProcessGroupTransport(), timeout=60)
    experts.commit(new)

Or let an `ExpertBalancer(experts, ...)` do that while the model serves: `balancer.step(experts.take_load())` after
each forward.
"""

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import nn

from eplb_core import EMPTY, Topology, check_placement, round_robin
from eplb_core._checks import require
from eplb_torch.dispatch import DeviceMaps
from eplb_torch.integrations._exchange import Group
from eplb_torch.integrations._experts import ExpertLayer, ReadExpert, find_expert_layers, localise
from eplb_torch.integrations._forward import ExpertParallelForward
from eplb_torch.integrations._model import ExpertParallelModel, check_group, rank_in
from eplb_torch.weights import ExpertWeights

__all__ = ("ExpertParallelModel", "expert_parallel", "joining_experts")


def expert_parallel(
    model: nn.Module,
    topology: Topology,
    physical_to_logical: Int[Any, "layers slots"] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    max_replicas: int | None = None,
    shared: Collection[str] = (),
    read_expert: ReadExpert | None = None,
) -> ExpertParallelModel:
    """Keep this rank's slots of every MoE layer, let the other experts go, and exchange tokens with other ranks.

    A collective over the group, and so is every forward after it: all ranks must call forward equally often, each
    with its own tokens, or under `ExpertParallelModel.idle`. A rank that stays away makes the others fail when the
    timeout of the process group (`init_process_group(timeout=...)`) ends. For inference, on one device per rank;
    move the model there first. If reading an expert fails, the model is left half changed: build it again.

    Args:
        model: changed in place. Every rank must start from the same one.
        topology: sizes of the group; `ep_size` is its number of ranks.
        physical_to_logical: `[layers, slots]`, the same on all ranks; by default `round_robin`.
        group: the expert-parallel process group; by default the default group.
        max_replicas: most copies of an expert in any later placement; by default as many as fit.
        shared: names, within an experts module, of tensors that belong to no expert, such as a norm inside it.
        read_expert: `(name, expert) -> row`, for a model whose stacked tensors are on the meta device because no
            rank can hold them all; by default rows come from the model's own tensors.

    Returns:
        The handle of the running model.

    Raises:
        EplbError: if the model has no experts to spread or some that would be left behind, the placement does not
            fit, or ranks differ in any of it.
    """
    layers = find_expert_layers(model, shared)
    num_logical = layers[0].num_logical
    if physical_to_logical is None:
        physical_to_logical = round_robin(len(layers), num_logical, topology)
    placement = np.asarray(physical_to_logical)
    _check(model, topology, placement, layers, group)
    device = _device_of(model)
    _agree(topology, placement, layers, device, group)
    maps = DeviceMaps(placement, num_logical, max_replicas=max_replicas, device=device)
    by_rank = placement.reshape(len(layers), topology.ep_size, topology.slots_per_rank)
    own = by_rank[:, rank_in(group)].tolist()
    return _replace_forwards(model, topology, layers, own, read_expert, placement, maps, group)


def joining_experts(
    model: nn.Module, slots_per_rank: int, *, max_replicas: int | None = None, shared: Collection[str] = ()
) -> ExpertParallelModel:
    """Let all experts of a model go and make room for those that a group will send, such as in `ElasticGroup.join`.

    The model refuses to run until then. Local.

    Args:
        model: changed in place; of the same kind as that of the group, and with the same tensors apart from experts,
            which may be on the meta device.
        slots_per_rank: of the group.
        max_replicas, shared: as for `expert_parallel`.

    Raises:
        EplbError: as `expert_parallel`, for the model.
    """
    layers = find_expert_layers(model, shared)
    _check_kernels(model)
    vacant = np.full((len(layers), slots_per_rank), EMPTY, dtype=np.int32)
    maps = DeviceMaps(vacant, layers[0].num_logical, max_replicas=max_replicas, device=_device_of(model))
    topology = Topology(1, slots_per_rank)
    return _replace_forwards(model, topology, layers, vacant.tolist(), None, vacant, maps, None)


def _replace_forwards(
    model: nn.Module,
    topology: Topology,
    layers: list[ExpertLayer],
    own: list[list[int]],
    read_expert: ReadExpert | None,
    placement: np.ndarray,
    maps: DeviceMaps,
    group: Group,
) -> ExpertParallelModel:
    device = _device_of(model)
    weights = ExpertWeights([localise(*pair, read_expert, device) for pair in zip(layers, own, strict=True)])
    names = tuple(layer.name for layer in layers)
    experts = ExpertParallelModel(model, topology, names, weights, placement, maps, group)
    for i, layer in enumerate(layers):
        layer.module.forward = ExpertParallelForward(experts, i, layer.module.forward)
    return experts


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _check(
    model: nn.Module, topology: Topology, placement: np.ndarray, layers: list[ExpertLayer], group: Group
) -> None:
    _check_kernels(model)
    check_placement(placement, topology, layers[0].num_logical)
    require(
        len(placement) == len(layers),
        "`expert_parallel(physical_to_logical=...)` must have one row for each MoE layer",
        f"{len(placement)} rows, {len(layers)} layers from {layers[0].name} to {layers[-1].name}",
        "Leave dense layers out.",
    )
    check_group(topology, group)


def _check_kernels(model: nn.Module) -> None:
    require(
        not getattr(model, "use_kernels", False),
        "`expert_parallel(model=...)` must call its experts modules",
        "use_kernels=True, with which a kernel may compute a whole MoE block",
        "Load the model with use_kernels=False.",
    )


def _agree(
    topology: Topology, placement: np.ndarray, layers: list[ExpertLayer], device: torch.device, group: Group
) -> None:
    """Raise on every rank if any came with another topology, placement or model than rank 0."""
    facts = {
        "topology": topology,
        "physical_to_logical": placement.tolist(),
        "model": [(layer.name, layer.num_logical, layer.tensors) for layer in layers],
    }
    digests = [list(hashlib.sha256(repr(fact).encode()).digest()) for fact in facts.values()]
    mine = torch.tensor(digests, dtype=torch.uint8, device=device)
    everyones = [torch.empty_like(mine) for _ in range(topology.ep_size)]
    dist.all_gather(everyones, mine, group=group)
    odd = {
        name: [rank for rank, theirs in enumerate(everyones) if not torch.equal(theirs[i], everyones[0][i])]
        for i, name in enumerate(facts)
    }
    odd = {name: ranks for name, ranks in odd.items() if ranks}
    require(
        not odd,
        "`expert_parallel` needs the same topology, physical_to_logical and model on all ranks",
        f"others than rank 0's on ranks {odd}",
        "Compute them from the same inputs on every rank, or broadcast them.",
    )
