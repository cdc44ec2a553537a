"""Our own placements, `.npz`: `physical_to_logical` and, as JSON in `meta`, the group that it is for."""

import json
from typing import Any

import numpy as np

from eplb_core import _npz
from eplb_core._checks import require
from eplb_core._files import PathLike
from eplb_core.formats.arrays import meta_of
from eplb_core.formats.values import metadata_of, placement_of
from eplb_core.topology import Topology

_SIZES = ("ep_size", "num_nodes", "num_logical")


def read_placement(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement and what is stated about it."""
    arrays = _npz.read_npz(path, limit_bytes=limit_bytes)
    require(
        "physical_to_logical" in arrays,
        f"`{path}` must have an array `physical_to_logical`",
        f"arrays {sorted(arrays)[:8]}",
        "If it holds loads, make a placement with `eplb plan`.",
    )
    ids, meta = placement_of(arrays["physical_to_logical"], path), meta_of(arrays, path)
    good = all(type(meta[key]) is int and meta[key] > 0 for key in _SIZES if key in meta)
    require(good, f"`{path}` must state sizes > 0", f"{ {key: meta.get(key) for key in _SIZES} }", "Write it again.")
    return ids, {key: meta[key] for key in (*_SIZES, "layer_ids", "metadata") if key in meta}


def write_placement(
    path: PathLike,
    physical_to_logical: np.ndarray,
    topology: Topology,
    num_logical: int,
    layer_ids: list[int],
    metadata: dict[str, Any] | None,
) -> None:
    """Write a placement with all that is known about it."""
    meta = {
        "ep_size": topology.ep_size,
        "num_nodes": topology.num_nodes,
        "num_logical": num_logical,
        "layer_ids": layer_ids,
        "metadata": metadata_of(metadata, path),
    }
    _npz.write_npz(path, physical_to_logical=physical_to_logical, meta=np.asarray(json.dumps(meta)))
