"""vllm-ascend: the expert map as JSON, a list of experts per device of each MoE layer."""

from itertools import chain
from typing import Any

import numpy as np

from eplb_core._checks import EMPTY, require
from eplb_core._files import PathLike
from eplb_core.formats.values import MOST_ENTRIES, array_of, layer_ids_of, placement_of
from eplb_core.topology import Topology

_ADVICE = "Check that it is an expert map of vllm-ascend, and whole."


def placement_from_object(value: Any, path: PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement of an expert map.

    Devices count in the order in which they are listed, as in vllm-ascend. One with fewer experts than the others
    gets `EMPTY` slots at its end.
    """
    layers = _dicts(value, "layer_list", path)
    devices = [_dicts(layer, "device_list", path) for layer in layers]
    counts = {len(row) for row in devices}
    stated = {layer.get("device_count", len(row)) for layer, row in zip(layers, devices, strict=True)}
    require(
        len(counts) == 1 and stated == counts and value.get("moe_layer_count", len(layers)) == len(layers),
        f"`{path}` must list as many layers and devices as it states, the same devices in every layer",
        f"{len(layers)} of {value.get('moe_layer_count')} layers, {sorted(counts)[:4]} devices",
        _ADVICE,
    )
    ordered = all(d.get("device_id", rank) == rank for row in devices for rank, d in enumerate(row))
    require(ordered, f"`{path}` must list its devices in the order of device_id", "another order", "Sort them.")
    experts: list[list[list]] = [[device.get("device_expert", []) for device in row] for row in devices]
    slots_per_rank = max(map(len, chain(*experts)))
    require(
        slots_per_rank * len(layers) * len(devices[0]) <= MOST_ENTRIES,
        f"`{path}` must have at most {MOST_ENTRIES} slots",
        f"{slots_per_rank} in {len(layers)} layers of {len(devices[0])} devices",
        _ADVICE,
    )
    full = [[ids + [EMPTY] * (slots_per_rank - len(ids)) for ids in row] for row in experts]
    ids = placement_of(array_of(full, path).reshape(len(layers), -1), path)
    numbers = layer_ids_of((layer.get("layer_id", index) for index, layer in enumerate(layers)), path)
    return ids, {"ep_size": counts.pop()} | ({"layer_ids": numbers} if numbers != list(range(len(numbers))) else {})


def object_of_placement(physical_to_logical: np.ndarray, topology: Topology) -> dict[str, Any]:
    """Return the expert map; layers are numbered from 0, as vllm-ascend counts MoE layers only."""
    ranks = physical_to_logical.reshape(len(physical_to_logical), topology.ep_size, topology.slots_per_rank).tolist()
    layers = [
        {
            "layer_id": layer,
            "device_count": topology.ep_size,
            "device_list": [{"device_id": rank, "device_expert": ids} for rank, ids in enumerate(row)],
        }
        for layer, row in enumerate(ranks)
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def _dicts(value: Any, key: str, path: PathLike) -> list[dict]:
    found = value.get(key) if isinstance(value, dict) else None
    good = isinstance(found, list) and bool(found) and all(isinstance(item, dict) for item in found)
    require(good, f"`{path}` must have a list of objects `{key}`", type(found).__name__, _ADVICE)
    return found or []
