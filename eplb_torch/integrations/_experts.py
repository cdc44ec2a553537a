"""Find the modules whose experts are stacked tensors, and cut them down to the slots of one rank."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eplb_core import EMPTY
from eplb_core._checks import listing, require

CPU = torch.device("cpu")

ReadExpert = Callable[[str, int], Tensor]
"""`(name of a stacked tensor in the model, logical expert) -> [...]`: the row of that expert."""


class ExpertLayer(NamedTuple):
    """The experts module of one MoE layer.

    name: path of the module in the model.
    module: takes `(hidden_states, top_k_index, top_k_weights)`.
    num_logical: experts it stacks.
    tensors: names, within the module, of its tensors `[logical, ...]`.
    """

    name: str
    module: nn.Module
    num_logical: int
    tensors: tuple[str, ...]


def find_expert_layers(model: nn.Module, shared: Collection[str] = ()) -> list[ExpertLayer]:
    """Find every MoE layer, or say why that cannot be done safely.

    An experts module has an integer `num_experts`, a tensor `[num_experts, ., ...]` of three dimensions or more of
    its own, and a forward of three positional arguments. Each tensor in it must be a parameter or a buffer with
    `num_experts` rows, or be named as shared.

    Args:
        model: searched in the order of `named_modules`; layers without experts are passed over.
        shared: names, within an experts module, of tensors that all experts share and every rank keeps.

    Raises:
        EplbError: if there is no such module, layers differ in their number of experts, or a module looks like
            experts and breaks the rules above. Lists the offenders.
    """
    layers = [
        ExpertLayer(name, module, _num_experts(module), tuple(n for n in _tensors(module) if n not in shared))
        for name, module in model.named_modules()
        if _stacks_experts(module)
    ]
    problems = [
        *(problem for name, module in model.named_modules() for problem in _explain_lookalike(name, module)),
        *(problem for layer in layers for problem in _explain_misfit(layer)),
        *_explain_ties(layers),
        *(f"shared={name!r} in no experts module" for name in shared if not _is_in_any(name, layers)),
    ]
    if len({layer.num_logical for layer in layers}) > 1:
        problems += [f"{layer.name} with {layer.num_logical} experts" for layer in layers]
    require(
        bool(layers) and not problems,
        "`expert_parallel(model=...)` needs MoE layers with equally many experts, which are the rows of every tensor "
        "of an experts module called with hidden states, ids and weights",
        listing(problems) if problems else f"a {type(model).__name__} with no stacked experts",
        "Pass the part of the model that has such layers, make tensors parameters or buffers, or name in `shared` "
        "what belongs to no expert.",
    )
    return layers


def localise(
    layer: ExpertLayer, experts: Sequence[int], read_expert: ReadExpert | None, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Replace the stacked tensors of a layer by the rows of the given slots; the originals are let go.

    Args:
        layer: changed in place: its module has `len(experts)` experts afterwards.
        experts: the expert of each local slot, or `EMPTY` for a row of zeros.
        read_expert: where rows come from; by default the module's own tensors.
        device: of rows for tensors without data, if none is read.

    Returns:
        `{name: [slots_per_rank, ...]}` the very tensors that the module computes with from now on.

    Raises:
        EplbError: if a tensor has no data to read, or a row read has another shape or dtype.
    """
    local = {}
    for name in layer.tensors:
        owner, leaf = _owner(layer.module, name)
        local[name] = _read_rows(f"{layer.name}.{name}", getattr(owner, leaf), experts, read_expert, device)
        if leaf in owner._parameters:
            local[name] = nn.Parameter(local[name], requires_grad=False)
        setattr(owner, leaf, local[name])
    vars(layer.module)["num_experts"] = len(experts)
    return local


def enlarged(layer: Mapping[str, Tensor], slots: int) -> dict[str, Tensor]:
    """Copy the tensors of a layer to larger ones, with rows of zeros behind the present ones."""
    larger = {}
    for name, tensor in layer.items():
        rows = tensor.new_zeros((slots, *tensor.shape[1:]))
        rows[: len(tensor)].copy_(tensor)
        larger[name] = nn.Parameter(rows, requires_grad=False) if isinstance(tensor, nn.Parameter) else rows
    return larger


def install(module: nn.Module, layer: Mapping[str, Tensor], slots: int) -> None:
    """Let an experts module compute with other tensors, by the names that `localise` gave."""
    for name, tensor in layer.items():
        owner, leaf = _owner(module, name)
        setattr(owner, leaf, tensor)
    vars(module)["num_experts"] = slots


def _read_rows(
    name: str, whole: Tensor, experts: Sequence[int], read_expert: ReadExpert | None, device: torch.device
) -> Tensor:
    require(
        read_expert is not None or not whole.is_meta or set(experts) <= {EMPTY},
        "`expert_parallel(read_expert=...)` must be given for a model whose experts have no data",
        f"{name} on the meta device",
        "Pass a function that reads the row of one expert, or load the model first.",
    )
    read = read_expert or (lambda _, expert: whole[expert])
    rows = {slot: read(name, expert).detach() for slot, expert in enumerate(experts) if expert != EMPTY}
    odd = {(tuple(row.shape), row.dtype) for row in rows.values()} - {(tuple(whole.shape[1:]), whole.dtype)}
    require(
        not odd,
        f"`expert_parallel(read_expert=...)` must return {tuple(whole.shape[1:])} {whole.dtype} for {name}",
        listing(odd),
        "Convert the row while reading it.",
    )
    device = next((row.device for row in rows.values()), device) if whole.is_meta else whole.device
    local = torch.zeros((len(experts), *whole.shape[1:]), dtype=whole.dtype, device=device)
    for slot, row in rows.items():
        local[slot].copy_(row)
    return local


def _num_experts(module: nn.Module) -> int:
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) else 0


def _stacks_experts(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.ndim >= 3 and tensor.shape[0] == _num_experts(module) for tensor in own)


def _explain_lookalike(name: str, module: nn.Module) -> list[str]:
    """What is odd about a module that is named like experts and neither is nor contains an experts module."""
    leaf, kind = name.rpartition(".")[2], type(module).__name__
    named_like = leaf == "experts" or (kind.endswith("Experts") and "shared" not in f"{kind} {leaf}".lower())
    if not named_like or any(_stacks_experts(part) for part in module.modules()):
        return []
    shapes = [f"{key} {tuple(tensor.shape)}" for key, tensor in module.named_parameters()]
    return [f"{name} ({kind}) with no [num_experts, ., .] of its own but {listing(shapes, 3)}"] if shapes else []


def _explain_misfit(layer: ExpertLayer) -> list[str]:
    """Why a module cannot run on rows that come from other ranks, or would leave a tensor behind."""
    name, module = layer.name, layer.module
    problems = []
    if "forward" in vars(module) or getattr(module, "_is_expert_parallel", False):
        problems.append(f"{name} with a forward that was replaced already, or made expert-parallel")
    arguments = inspect.signature(module.forward).parameters.values()
    names = [a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    if len(names) != 3:
        problems.append(f"{name} ({type(module).__name__}) called with ({', '.join(names)})")
    for tensor_name in layer.tensors:
        owner, leaf = _owner(module, tensor_name)
        tensor = getattr(owner, leaf)
        if leaf in vars(owner):
            problems.append(f"{name}.{tensor_name}, a tensor that is neither parameter nor buffer")
        elif tensor.shape[:1] != (layer.num_logical,):
            problems.append(f"{name}.{tensor_name} {tuple(tensor.shape)} without {layer.num_logical} rows")
    return problems


def _explain_ties(layers: Sequence[ExpertLayer]) -> Iterator[str]:
    first: dict[int, str] = {}
    for layer in layers:
        tensors = _tensors(layer.module)
        for name in layer.tensors:
            path, identity = f"{layer.name}.{name}", id(tensors[name])
            if first.setdefault(identity, path) != path:
                yield f"{path}, the same tensor as {first[identity]}"


def _is_in_any(name: str, layers: Sequence[ExpertLayer]) -> bool:
    return any(name in _tensors(layer.module) for layer in layers)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and bare tensor attributes of a module and of all that is in it, by name."""
    bare = {
        f"{path}.{leaf}".lstrip("."): value
        for path, owner in module.named_modules()
        for leaf, value in vars(owner).items()
        if isinstance(value, Tensor)
    }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False)) | bare


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
