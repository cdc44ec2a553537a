"""Nested tuples of arrays, such as the state of a load estimator, as named arrays and a skeleton for JSON."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eplb_core import _ops
from eplb_core._checks import require

_KINDS = "biuf"


def flatten(tree: Any, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Take a tree apart: dicts with text as keys, tuples, lists and None; anything else is an array.

    Returns:
        The tree as JSON, in which `<name>.<number>` stands for each array, and the arrays by these names.

    Raises:
        EplbError: naming what is neither, or an array of anything but finite numbers of at most 64 bits.
    """
    arrays: dict[str, np.ndarray] = {}

    def visit(part: Any, path: str) -> Any:
        if part is None:
            return None
        if isinstance(part, Mapping):
            odd = [key for key in part if not isinstance(key, str)]
            require(not odd, f"`{path}` must have text as keys", f"{odd[:8]}", "Convert them.")
            return {key: visit(value, f"{path}.{key}") for key, value in part.items()}
        if isinstance(part, tuple | list):
            return [visit(value, f"{path}.{i}") for i, value in enumerate(part)]
        array = np.asarray(_ops.as_array(part))
        _check_numbers(array, path)
        arrays[f"{name}.{len(arrays)}"] = array
        return f"{name}.{len(arrays) - 1}"

    return visit(tree, name), arrays


def unflatten(skeleton: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Put a tree together again. Lists become tuples.

    Raises:
        EplbError: if the skeleton is not one, names an array that is missing, or one holds anything but finite numbers.
    """
    if skeleton is None:
        return None
    if isinstance(skeleton, dict):
        return {key: unflatten(value, arrays) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return tuple(unflatten(value, arrays) for value in skeleton)
    require(
        isinstance(skeleton, str) and skeleton in arrays,
        "a tree must name arrays that are there",
        f"{skeleton!r}"[:80],
        "Save it again.",
    )
    _check_numbers(arrays[skeleton], skeleton)
    return arrays[skeleton]


def like(tree: Any, template: Any, name: str) -> Any:
    """Give a tree the tuple types of a template that has the same structure, shapes and kinds of numbers.

    Raises:
        EplbError: naming the first place where the two differ.
    """
    if isinstance(template, Mapping) and isinstance(tree, Mapping) and template.keys() == tree.keys():
        return {key: like(tree[key], template[key], f"{name}.{key}") for key in template}
    if isinstance(template, tuple | list) and isinstance(tree, tuple | list) and len(template) == len(tree):
        values = [like(*pair, f"{name}.{i}") for i, pair in enumerate(zip(tree, template, strict=True))]
        return type(template)(*values) if hasattr(template, "_fields") else type(template)(values)
    same = template is tree is None
    if isinstance(tree, np.ndarray) and not isinstance(template, tuple | list | Mapping | None):
        _check_numbers(tree, name)
        wanted = np.asarray(template)
        same = wanted.shape == tree.shape and (wanted.dtype.kind == "f") == (tree.dtype.kind == "f")
    require(
        same,
        f"`{name}` must have the structure and shape of what it is to continue, {_describe(template)}",
        _describe(tree),
        "Load it with the estimator, and for the model, that it was saved with.",
    )
    return tree


def _check_numbers(array: np.ndarray, name: str) -> None:
    good = array.dtype.kind in _KINDS and array.dtype.itemsize <= 8
    require(
        good and (array.dtype.kind != "f" or bool(np.isfinite(array).all())),
        f"`{name}` must be an array of finite numbers of at most 64 bits",
        f"{array.dtype} of shape {array.shape}" + (" with NaN or infinity" if good else ""),
        "Save estimates only.",
    )


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"a dict with the keys {list(tree)[:8]}"
    if isinstance(tree, tuple | list):
        return f"{len(tree)} parts"
    if tree is None:
        return "nothing"
    array = np.asarray(_ops.as_array(tree))
    return f"{array.dtype} of shape {array.shape}"
