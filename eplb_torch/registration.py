"""Find all tensors of the experts modules of a model, so that none is forgotten."""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from eplb_core._checks import listing, require


def find_slot_tensors(
    module: nn.Module, layers: Sequence[str], slots_per_rank: int, exclude: Collection[str]
) -> list[dict[str, Tensor]]:
    """Collect the tensors of each experts module that are not excluded. See `ExpertWeights.from_module`.

    Raises:
        EplbError: listing every tensor that is neither per slot nor excluded, every layer that does not exist, and
            every name in `exclude` that matches nothing.
    """
    modules = dict(module.named_modules())
    missing = [name for name in layers if name not in modules]
    require(
        not missing,
        "`ExpertWeights.from_module(layers=...)` must be paths of modules",
        f"no module at {listing(missing)}",
        "Use names as in `module.named_modules()`.",
    )
    found = [dict(_tensors(modules[name])) for name in layers]
    unused = [pattern for pattern in exclude if not any(fnmatchcase(n, pattern) for names in found for n in names)]
    require(
        not unused,
        "`ExpertWeights.from_module(exclude=...)` must name tensors of the experts modules",
        f"{listing(unused)}, which match none",
        "Correct or remove them.",
    )
    kept = [{n: t for n, t in names.items() if not any(fnmatchcase(n, p) for p in exclude)} for names in found]
    odd = [
        f"{layer}.{name} {tuple(tensor.shape)}"
        for layer, names in zip(layers, kept, strict=True)
        for name, tensor in names.items()
        if tensor.ndim == 0 or tensor.shape[0] != slots_per_rank
    ]
    require(
        not odd,
        "`ExpertWeights.from_module` needs every tensor of an experts module to be excluded or to have "
        f"slots_per_rank={slots_per_rank} rows",
        listing(odd),
        "Exclude what all experts share; store what belongs to the experts with the slot as the first dimension.",
    )
    return kept


def _tensors(experts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and tensors in plain attributes, with their paths; each tensor object once."""
    seen: set[int] = set()
    for path, module in experts.named_modules():
        prefix = f"{path}." if path else ""
        registered = {**module._parameters, **module._buffers}
        plain = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        for name, value in {**registered, **plain}.items():
            for suffix, tensor in _inside(value):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}{name}{suffix}", tensor


_INTERNAL = frozenset(vars(nn.Module()))


def _inside(value: Any, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in a value, or in lists, tuples and dicts nested in it."""
    if isinstance(value, Tensor):
        yield suffix, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _inside(item, f"{suffix}.{i}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(item, f"{suffix}.{key}")
