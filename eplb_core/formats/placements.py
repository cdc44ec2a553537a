"""Read and write placements of any known format."""

import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._checks import EMPTY, MOST_EXPERTS, check_count, check_kind, require
from eplb_core._files import PathLike, check_path
from eplb_core._npz import LIMIT_BYTES, read_npy
from eplb_core.formats import arrays, own_placement, sglang, sglang_pt, tensorrt_llm, text, vllm_ascend
from eplb_core.formats.layers import layer_ids_or_range, spread_out
from eplb_core.formats.names import choose
from eplb_core.formats.values import blaming, placement_of
from eplb_core.topology import Topology

PLACEMENT_FORMATS = ("npz", "npy", "json", "sglang", "sglang-pt", "tensorrt-llm", "vllm-ascend")
_WITH_EMPTY = ("npz", "npy", "json")
_WITH_RANKS = ("npz", "vllm-ascend")


class StoredPlacement(NamedTuple):
    """A placement from a file, and what the file says about it.

    physical_to_logical: `[layers, slots]` int32 expert ids, or `EMPTY`.
    info: `format`, and of `ep_size`, `num_nodes`, `num_logical`, `layer_ids` and `metadata` what the file states.
    """

    physical_to_logical: Int[np.ndarray, "layers slots"]
    info: dict[str, Any]


def read_placement(path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES) -> StoredPlacement:
    """Read a placement of any known format.

    Args:
        path: the file.
        format: one of `PLACEMENT_FORMATS`; by default told from the file's name, and for JSON from its keys.
        limit_bytes: most bytes of the file and of what it unpacks to. Text takes more room when it is parsed, so its
            files may have a fraction of this: 1/32 as JSON, 1/1024 as YAML.

    Returns:
        `StoredPlacement`. Layers are in the file's order, except for `"tensorrt-llm"`, where they are sorted.

    Raises:
        EplbError: naming the file, if it is missing, damaged, too large, of another format, or holds no placement.
            Experts without a copy are not looked for; `check_placement` does that.
    """
    name = choose(path, format, PLACEMENT_FORMATS, "read_placement")
    with blaming(path):
        if name in ("json", "sglang", "vllm-ascend"):
            value = text.read_json(path, limit_bytes)
            name = text.json_format(value) if format is None else name
            ids, info = _from_json(name, value, path)
        elif name == "npz":
            ids, info = own_placement.read_placement(path, limit_bytes)
        elif name == "npy":
            ids, info = placement_of(read_npy(path, limit_bytes=limit_bytes), path), {}
        else:
            ids, info = (tensorrt_llm if name == "tensorrt-llm" else sglang_pt).read_placement(path, limit_bytes)
        return StoredPlacement(ids, {"format": name} | info)


def write_placement(
    path: PathLike,
    physical_to_logical: Int[Any, "layers slots"],
    topology: Topology | None = None,
    *,
    format: str | None = None,
    num_logical: int | None = None,
    layer_ids: list[int] | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a placement; the file takes the place of `path` at once, or nothing changes.

    Args:
        path: the file to write.
        physical_to_logical: `[layers, slots]`. Engines' formats have no `EMPTY`; `.npz`, `.npy` and plain JSON do.
        topology: the group that it is for. `"npz"` and `"vllm-ascend"` need it.
        format: one of `PLACEMENT_FORMATS`; by default told from the file's name, `.json` being `"sglang"`.
        num_logical: experts the router knows; by default the largest id plus one.
        layer_ids: the model's number of each row. `"npz"` keeps them, `"tensorrt-llm"` names rows by them, and SGLang's
            formats put each row there, with round-robin rows between for layers that have no experts.
        metadata: JSON values by name, which `"npz"` keeps.

    Raises:
        EplbError: if the placement is not of this form, or the format cannot express it.
        OSError: if the file cannot be written.
    """
    check_path(path, "write_placement(path=...)")
    check_kind(format, (str, type(None)), "write_placement(format=...)")
    by_default = "sglang" if os.path.splitext(path)[1].lower() == ".json" else None
    name = choose(path, format or by_default, PLACEMENT_FORMATS, "write_placement")
    check_kind(topology, (Topology, type(None)), "write_placement(topology=...)")
    if num_logical is not None:
        num_logical = check_count(num_logical, "write_placement(num_logical=...)", 1, MOST_EXPERTS)
    ids = placement_of(_ops.as_array(physical_to_logical), path)
    _check(name, ids, topology, path)
    numbers = layer_ids_or_range(layer_ids, len(ids), path)
    experts = max(int(ids.max()) + 1, 1) if num_logical is None else num_logical
    if name == "npz" and topology is not None:
        own_placement.write_placement(path, ids, topology, experts, numbers, metadata)
    elif name == "npy":
        arrays.write_npy(path, ids)
    elif name == "json":
        text.write_json(path, ids.tolist())
    elif name == "tensorrt-llm":
        tensorrt_llm.write_placement(path, ids, numbers)
    elif name == "vllm-ascend" and topology is not None:
        text.write_json(path, vllm_ascend.object_of_placement(ids, topology))
    else:
        rows = spread_out(ids, numbers, fill=np.arange(ids.shape[1]) % experts)
        if name == "sglang":
            text.write_json(path, {"physical_to_logical_map": rows.tolist()})
        else:
            sglang_pt.write_placement(path, rows)


def _from_json(name: str, value: Any, path: PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    if name == "vllm-ascend":
        return vllm_ascend.placement_from_object(value, path)
    if name == "sglang":
        return sglang.placement_from_object(value, path)
    require(
        isinstance(value, list),
        f"`{path}` must be nested lists of expert ids, or an object with one of {', '.join(text.KEYS)}",
        f"keys {sorted(value)[:8]}" if isinstance(value, dict) else type(value).__name__,
        "If it holds loads, make a placement with `eplb plan`.",
    )
    return placement_of(value, path), {}


def _check(name: str, ids: np.ndarray, topology: Topology | None, path: PathLike) -> None:
    require(
        name in _WITH_EMPTY or bool((ids != EMPTY).all()),
        f"`write_placement(format={name!r})` must get an expert for every slot",
        f"EMPTY slots for {path}",
        f"Fill them, or use one of {', '.join(_WITH_EMPTY)}.",
    )
    require(
        name not in _WITH_RANKS or topology is not None,
        f"`write_placement(format={name!r})` must get the topology",
        f"none for {path}",
        "Say how many ranks there are.",
    )
    require(
        topology is None or topology.num_slots == ids.shape[1],
        "`write_placement(topology=...)` must have as many slots as the placement",
        f"{topology} for {ids.shape[1]} slots",
        "Build the Topology for this placement.",
    )
