"""What a restart must not forget: the live placement, and the load seen so far."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import _npz, _ops, _tree
from eplb_core._checks import MOST_EXPERTS, EplbError, check_kind, require, shown
from eplb_core._files import PathLike, check_path
from eplb_core.formats import text
from eplb_core.formats.arrays import meta_of
from eplb_core.formats.values import array_of, blaming, metadata_of, placement_of
from eplb_core.placement import check_placement, check_sizes
from eplb_core.topology import Topology

VERSION = 1
LIMIT_BYTES = 2**26
_SUFFIXES = (".npz", ".json")
_MOST = dict.fromkeys(("ep_size", "slots_per_rank", "num_nodes", "num_logical"), MOST_EXPERTS) | {"epoch": 2**63}
_DTYPE = re.compile(r"[<>=|]?[biuf][1248]")


class Snapshot(NamedTuple):
    """The state of one balanced model.

    physical_to_logical: `[layers, slots]` int32, the placement in force.
    topology: sizes of the expert-parallel group.
    num_logical: experts the router knows.
    epoch: number of the placement in force.
    load: the state of a load estimator, or any other nested tuples, lists and dicts of arrays; None for none.
    metadata: whatever else JSON can express, such as the model's name; None for nothing.
    """

    physical_to_logical: Int[Any, "layers slots"]
    topology: Topology
    num_logical: int
    epoch: int = 0
    load: Any = None
    metadata: Mapping[str, Any] | None = None


def save_snapshot(path: PathLike, snapshot: Snapshot) -> None:
    """Write a snapshot that takes the place of `path` at once: a crash leaves the old file or the new one.

    An `.npz` can also be read as a placement, by `read_placement` and the commands.

    Args:
        path: ends in `.npz`, or in `.json` for text that is 3 to 10 times larger.
        snapshot: experts may be lost in it.

    Raises:
        EplbError: if it is malformed, so that it could not be loaded.
        OSError: if the file cannot be written; `path` is unchanged then.
    """
    suffix = _suffix(path, "save_snapshot")
    check_kind(snapshot, Snapshot, "save_snapshot(snapshot=...)")
    check_kind(snapshot.metadata, (Mapping, type(None)), "save_snapshot(snapshot.metadata=...)")
    ids, sizes = np.asarray(_ops.as_array(snapshot.physical_to_logical)), snapshot._asdict()
    num_logical, epoch = _count(sizes, "num_logical"), _count(sizes, "epoch")
    check_placement(ids, snapshot.topology, num_logical, allow_lost=True)
    skeleton, arrays = _tree.flatten(snapshot.load, "load")
    meta = {
        "snapshot": VERSION,
        "ep_size": snapshot.topology.ep_size,
        "slots_per_rank": snapshot.topology.slots_per_rank,
        "num_nodes": snapshot.topology.num_nodes,
        "num_logical": num_logical,
        "epoch": epoch,
        "load": skeleton,
        "metadata": metadata_of(None if snapshot.metadata is None else dict(snapshot.metadata), path),
    }
    arrays = {"physical_to_logical": ids.astype(np.int32)} | arrays
    if suffix == ".npz":
        _npz.write_npz(path, meta=np.asarray(json.dumps(meta)), **arrays)
    else:
        text.write_json(path, meta | {"arrays": {name: _to_json(array) for name, array in arrays.items()}})


def load_snapshot(
    path: PathLike,
    topology: Topology | None = None,
    *,
    load_like: Any = None,
    allow_lost: bool = False,
    limit_bytes: int = LIMIT_BYTES,
) -> Snapshot:
    """Read a snapshot and check everything in it. Nothing in a file is trusted or executed.

    Args:
        path: written by `save_snapshot`, or as `.npz` by `write_placement`; that has no load, and the epoch 0.
        topology: the group that goes on with it: of as many ranks and slots, on any number of nodes. By default the
            one that it was saved from.
        load_like: a value with the structure that the load must have, such as `estimator.init(layers, logical)`,
            whose types it then gets. By default it has tuples where there were tuples or lists of any type.
        allow_lost: accept experts without a copy, as after the loss of a rank.
        limit_bytes: most bytes of the file, and of what it unpacks to; a 32nd of it for `.json`.

    Returns:
        `Snapshot`, with NumPy arrays and the given topology.

    Raises:
        EplbError: naming the file, if it is missing, damaged, too large or of a later version, or does not fit.
    """
    suffix = _suffix(path, "load_snapshot")
    check_kind(topology, (Topology, type(None)), "load_snapshot(topology=...)")
    with blaming(path):
        meta, arrays = _read_npz(path, limit_bytes) if suffix == ".npz" else _read_json(path, limit_bytes)
        ids = placement_of(arrays["physical_to_logical"], path)
        try:
            snapshot = _assemble(meta, arrays, ids, topology, allow_lost)
            return (
                snapshot if load_like is None else snapshot._replace(load=_tree.like(snapshot.load, load_like, "load"))
            )
        except EplbError as error:
            raise EplbError(f"`{path}` is no snapshot that can be used here. {error}") from error


def _assemble(
    meta: dict[str, Any], arrays: Mapping[str, np.ndarray], ids: np.ndarray, wanted: Topology | None, allow_lost: bool
) -> Snapshot:
    version = meta.get("snapshot", VERSION)
    require(version == VERSION, f"a snapshot must be of version {VERSION}", f"{version!r}"[:80], "Update eplb.")
    ep_size, num_nodes, num_logical = (_count(meta, key) for key in ("ep_size", "num_nodes", "num_logical"))
    epoch = _count(meta, "epoch", 0)
    saved = Topology(ep_size, _count(meta, "slots_per_rank", ids.shape[1] // max(ep_size, 1)), num_nodes)
    topology = saved if wanted is None else wanted
    require(
        (saved.ep_size, saved.slots_per_rank) == (topology.ep_size, topology.slots_per_rank),
        "`load_snapshot(topology=...)` must have the ranks and slots of the snapshot",
        f"{topology}, saved from {saved}",
        "Load it with its own topology, then grow or shrink it with eplb_core.elastic.",
    )
    if not allow_lost:
        check_sizes(num_logical, topology, "num_logical")
    check_placement(ids, topology, num_logical, allow_lost=allow_lost)
    load, metadata = _tree.unflatten(meta.get("load"), arrays), metadata_of(meta.get("metadata"), "metadata")
    return Snapshot(ids, topology, num_logical, epoch, load, metadata)


def _read_npz(path: PathLike, limit_bytes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = _npz.read_npz(path, limit_bytes=limit_bytes)
    return meta_of(arrays, path), arrays


def _read_json(path: PathLike, limit_bytes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    meta = text.read_json(path, limit_bytes)
    require(
        isinstance(meta, dict) and "snapshot" in meta and isinstance(meta.get("arrays"), dict),
        f"`{path}` must be a JSON object with `snapshot` and `arrays`",
        f"{list(meta)[:8] if isinstance(meta, dict) else type(meta).__name__}"[:200],
        "Read traces and placements of other formats with eplb_core.trace.",
    )
    return meta, {name: _from_json(value, f"{path}: {name}") for name, value in meta.pop("arrays").items()}


def _to_json(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "values": array.ravel().tolist()}


def _from_json(value: Any, name: str) -> np.ndarray:
    """The array that `_to_json` was given, to the bit; whatever else is refused."""
    dtype, shape, values = (value[key] for key in ("dtype", "shape", "values"))
    require(
        isinstance(dtype, str) and _DTYPE.fullmatch(dtype) is not None and isinstance(values, list),
        f"`{name}` must be a list of numbers with a dtype",
        f"dtype {dtype!r}"[:80],
        "Save it again.",
    )
    is_bool = bool(values) and all(isinstance(value, bool) for value in values)
    found = np.asarray(values) if is_bool else array_of(values, name)
    with np.errstate(all="ignore"):
        array = found.astype(np.dtype(dtype))
    require(
        array.ndim == 1 and (not values or is_bool == (array.dtype.kind == "b")) and bool((array == found).all()),
        f"`{name}` must hold numbers of its dtype",
        f"others than {array.dtype}",
        "Save it again.",
    )
    array = array.reshape(shape)
    require(list(array.shape) == shape, f"`{name}` must state its shape", f"{shape!r}"[:80], "Save it again.")
    return array


def _suffix(path: PathLike, name: str) -> str:
    check_path(path, f"{name}(path=...)")
    suffix = os.path.splitext(path)[1].lower()
    require(suffix in _SUFFIXES, f"`{name}(path=...)` must end in {' or '.join(_SUFFIXES)}", f"{path}", "Rename it.")
    return suffix


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(
        is_integer and 0 <= int(value) < _MOST[key],
        f"a snapshot's {key} must be an integer >= 0 and < {_MOST[key]}",
        shown(value),
        "Save it again.",
    )
    return int(value)  # type: ignore[arg-type]
