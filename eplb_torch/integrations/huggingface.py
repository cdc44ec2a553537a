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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from eplb_core import EMPTY, Topology, check_placement, round_robin
from eplb_core._checks import require
from eplb_torch.dispatch import DeviceMaps, count_tokens, select_slots
from eplb_torch.integrations._exchange import Group, exchange_tokens
from eplb_torch.integrations._experts import ExpertLayer, ReadExpert, find_expert_layers, localise
from eplb_torch.weights import ExpertWeights


class ExpertParallelModel:
    """A model whose experts are spread over a process group: its live slots, maps and counters.

    Made by `expert_parallel`.

    Attributes:
        model: the model, changed in place.
        topology: sizes of the group.
        layer_names: path of the experts module of each MoE layer; their order is the layer axis of everything here.
        weights: this rank's slots, in the very tensors that the model computes with.
        maps: the dispatch maps that the model looks up.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        layer_names: tuple[str, ...],
        weights: ExpertWeights,
        physical_to_logical: Int[np.ndarray, "layers slots"],
        maps: DeviceMaps,
    ):
        self.model, self.topology, self.layer_names = model, topology, layer_names
        self.weights, self.maps = weights, maps
        self._placement = physical_to_logical.astype(np.int32)
        self._load = torch.zeros_like(maps.replica_count, dtype=torch.int64)
        self._taken, self._new = torch.zeros_like(self._load), torch.zeros_like(self._load)
        self._is_idle = False

    @property
    def num_logical(self) -> int:
        """Experts of each layer."""
        return self.maps.num_logical

    @property
    def placement(self) -> Int[np.ndarray, "layers slots"]:
        """A copy of the placement in force, `[layers, slots]` int32."""
        return self._placement.copy()

    def load(self) -> Int[Tensor, "layers logical"]:
        """Copy the tokens this rank's routers sent to each expert since the last reset, `[layers, logical]` int64.

        Sum it over the group for the load of the model. Padding that the model itself routes is counted.
        """
        return self._load.clone()

    def take_load(self) -> Int[Tensor, "layers logical"]:
        """Hand out the tokens since the last call, in a tensor that is reused: the next call overwrites it.

        For `ExpertBalancer.step` after every forward. `load` goes on counting beside it.

        Returns:
            `[layers, logical]` int64, of this rank.
        """
        torch.sub(self._load, self._taken, out=self._new)
        # Not a reset: copies of an expert take turns by what was counted, also where a forward has few tokens.
        self._taken.copy_(self._load)
        return self._new

    def reset_load(self) -> None:
        """Count from zero again, also for `take_load`."""
        self._load.zero_()
        self._taken.zero_()

    def commit(self, physical_to_logical: Int[Any, "*layers slots"], *, layer: int | None = None) -> None:
        """Route by a new placement from the next forward on: all layers, or one `layer` given `[slots]`.

        Moves no weights: commit when `weights` holds what the placement says, between the same two forwards on
        every rank. Maps change in place.

        Raises:
            EplbError: if the placement is malformed, leaves an expert without a slot, or gives one more copies than
                the maps have room for. The placement in force stays then.
        """
        new = np.asarray(physical_to_logical)
        check_placement(new if layer is None else new[None], self.topology, self.num_logical)
        self.maps.update(new, layer=layer)
        self._placement[slice(None) if layer is None else layer] = new

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Join a forward of the other ranks without tokens of one's own.

        Transformers models cannot be called with an empty batch. Inside this context, whatever the model is called
        with, say one token, is neither sent to an expert nor counted and its logits mean nothing, while this rank's
        experts serve the others.
        """
        self._is_idle = True
        try:
            yield
        finally:
            self._is_idle = False


class _ExpertParallelForward:
    """Stands in for the forward of one experts module; what it replaces runs on the rows that arrive."""

    def __init__(
        self,
        experts: ExpertParallelModel,
        layer: int,
        local_forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        group: Group,
    ):
        self._experts, self._local_forward, self._group = experts, local_forward, group
        self._maps, self._load = experts.maps.layer(layer), experts._load[layer]
        self._ep_rank = dist.get_rank(group)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _check_call(hidden_states, top_k_index, top_k_weights)
        if self._experts._is_idle:
            top_k_index = torch.full_like(top_k_index, EMPTY)
        slots = select_slots(top_k_index, self._maps, offset=self._load + self._ep_rank)
        self._load += count_tokens(top_k_index, self._load.shape[0])

        def run_slots(rows: Tensor, local_slots: Tensor) -> Tensor:
            unit_weights = top_k_weights.new_ones((rows.shape[0], 1))
            return self._local_forward(rows, local_slots.to(top_k_index.dtype).unsqueeze(1), unit_weights)

        topology = self._experts.topology
        return exchange_tokens(hidden_states, slots, top_k_weights, run_slots, topology, self._group)


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
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    _agree(topology, placement, layers, device, group)
    maps = DeviceMaps(placement, num_logical, max_replicas=max_replicas, device=device)
    by_rank = placement.reshape(len(layers), topology.ep_size, topology.slots_per_rank)
    own = by_rank[:, dist.get_rank(group)].tolist()
    weights = ExpertWeights([localise(*pair, read_expert) for pair in zip(layers, own, strict=True)])
    names = tuple(layer.name for layer in layers)
    experts = ExpertParallelModel(model, topology, names, weights, placement, maps)
    for i, layer in enumerate(layers):
        layer.module.forward = _ExpertParallelForward(experts, i, layer.module.forward, group)
    return experts


def _check(
    model: nn.Module, topology: Topology, placement: np.ndarray, layers: list[ExpertLayer], group: Group
) -> None:
    require(
        not getattr(model, "use_kernels", False),
        "`expert_parallel(model=...)` must call its experts modules",
        "use_kernels=True, with which a kernel may compute a whole MoE block",
        "Load the model with use_kernels=False.",
    )
    check_placement(placement, topology, layers[0].num_logical)
    require(
        len(placement) == len(layers),
        "`expert_parallel(physical_to_logical=...)` must have one row for each MoE layer",
        f"{len(placement)} rows, {len(layers)} layers from {layers[0].name} to {layers[-1].name}",
        "Leave dense layers out.",
    )
    require(
        dist.is_initialized(),
        "`expert_parallel` needs torch.distributed",
        "no initialised default process group",
        "Call torch.distributed.init_process_group first, with a timeout.",
    )
    require(
        dist.get_world_size(group) == topology.ep_size,
        "`expert_parallel(topology=...)` must have the ranks of the group",
        f"ep_size={topology.ep_size}, group size={dist.get_world_size(group)}",
        "Pass the expert-parallel group.",
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


def _check_call(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    tokens_k, shapes = top_k_index.shape, [tuple(t.shape) for t in (hidden_states, top_k_index, top_k_weights)]
    require(
        hidden_states.ndim == len(tokens_k) == 2
        and top_k_weights.shape == tokens_k
        and hidden_states.shape[0] == tokens_k[0],
        "experts under `expert_parallel` must be called with `[tokens, hidden]`, `[tokens, k]` and `[tokens, k]`",
        f"{shapes}",
        "Adapt the block that calls them.",
    )
    require(
        not (torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)),
        "a model under `expert_parallel` must run without gradients, which do not pass between ranks",
        "inputs that require them",
        "Call it under torch.no_grad() or torch.inference_mode().",
    )
