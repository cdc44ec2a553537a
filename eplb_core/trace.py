"""Read and write load traces and placements: our own format and those of engines. The formats are in docs/traces.md."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core._checks import require
from eplb_core._files import PathLike
from eplb_core._npz import LIMIT_BYTES, read_npy
from eplb_core.formats import arrays, sglang, text
from eplb_core.formats.values import load_of, metadata_of, placement_of
from eplb_core.topology import Topology


class Trace(NamedTuple):
    """Loads recorded over time, and what is known about them.

    load: `[windows, layers, experts]` int64 tokens per logical expert.
    metadata: JSON values by name, such as `model`, `top_k`, `window_tokens`, `labels` or `layer_ids`.
    """

    load: Int[np.ndarray, "windows layers experts"]
    metadata: dict[str, Any]


class StoredPlacement(NamedTuple):
    """A placement from a file, and what the file says about it.

    physical_to_logical: `[layers, slots]` int32 expert ids, or `EMPTY`.
    info: `format`, and of `ep_size`, `num_nodes`, `num_logical`, `layer_ids` and `metadata` what the file states.
    """

    physical_to_logical: Int[np.ndarray, "layers slots"]
    info: dict[str, Any]


TRACE_FORMATS = ("npz", "npy", "json", "sglang")
PLACEMENT_FORMATS = ("npy", "json", "sglang")
_BY_SUFFIX = {".npz": "npz", ".npy": "npy", ".json": "json"}


def read_trace(path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES) -> Trace:
    """Read a load trace of any known format.

    Args:
        path: the file; see docs/traces.md for what each format holds.
        format: one of `TRACE_FORMATS`; by default told from the file's name, and for JSON from its keys.
        limit_bytes: most bytes of the file and of what it unpacks to.

    Returns:
        `Trace`. Counts `[layers, experts]` are one window. Fractions are rounded half to even; see `load_of`.

    Raises:
        EplbError: naming the file, if it is missing, damaged, too large, of another format, or holds no load.
    """
    name = _trace_format(path, format)
    if name == "npz":
        return Trace(*arrays.read_npz_trace(path, limit_bytes))
    if name == "npy":
        return Trace(load_of(read_npy(path, limit_bytes=limit_bytes), path), {})
    value = text.read_json(path, limit_bytes)
    if name == "json" and text.json_format(value) == "sglang":
        name = "sglang"
    return Trace(*(sglang.load_from_object if name == "sglang" else text.load_from_json)(value, path))


def iter_windows(
    path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES
) -> Iterator[Int[np.ndarray, "layers experts"]]:
    """Yield the windows of a trace one by one; an `.npz` or `.npy` is never held as a whole.

    Args:
        path: as for `read_trace`.
        format: as for `read_trace`.
        limit_bytes: most bytes of one window; of the whole trace in formats that are not streamed.

    Yields:
        `[layers, experts]` int64 tokens.

    Raises:
        EplbError: as `read_trace`; damage is noticed when it is reached, and the checksum with the last window.
    """
    name = _trace_format(path, format)
    if name == "npz":
        yield from arrays.iter_npz_windows(path, limit_bytes)
    elif name == "npy":
        yield from arrays.iter_npy_windows(path, limit_bytes)
    else:
        yield from read_trace(path, format=format, limit_bytes=limit_bytes).load


def write_trace(
    path: PathLike,
    load: Trace | Any | Iterable[Any],
    metadata: dict[str, Any] | None = None,
    *,
    format: str | None = None,
) -> None:
    """Write a load trace; the file takes the place of `path` at once, or nothing changes.

    Args:
        path: the file to write.
        load: a `Trace`, an array `[windows, layers, experts]` or `[layers, experts]`, or an iterable of windows
            `[layers, experts]`, of which an `.npz` holds one in memory at a time.
        metadata: JSON values by name; by default those of the `Trace`.
        format: one of `TRACE_FORMATS`; by default told from the file's name.

    Raises:
        EplbError: if the load or the metadata are not of this form.
        OSError: if the file cannot be written.
    """
    name = _trace_format(path, format)
    if isinstance(load, Trace):
        load, metadata = load.load, load.metadata if metadata is None else metadata
    described = metadata_of(metadata, path)
    if not hasattr(load, "shape") and not isinstance(load, list | tuple):
        if name == "npz":
            arrays.write_npz_windows(path, load, described)
            return
        load = np.stack([np.asarray(window) for window in load])
    checked = load_of(np.asarray(load), path)
    if name == "npz":
        arrays.write_npz_trace(path, checked, described)
    elif name == "sglang":
        text.write_json(path, sglang.object_of_load(checked, described))
    elif name == "json":
        text.write_json(path, {"load": checked.tolist(), "metadata": described})
    else:
        with arrays.writing(path) as file:
            np.lib.format.write_array(file, checked, allow_pickle=False)


def read_placement(path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES) -> StoredPlacement:
    """Read a placement of any known format."""
    if _format(path, format, PLACEMENT_FORMATS, "read_placement") == "npy":
        return StoredPlacement(placement_of(read_npy(path, limit_bytes=limit_bytes), path), {"format": "npy"})
    value = text.read_json(path, limit_bytes)
    ids, info = sglang.placement_from_object(value, path)
    return StoredPlacement(ids, {"format": "sglang"} | info)


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
    """Write a placement in the format of an engine, or our own."""
    ids = placement_of(np.asarray(physical_to_logical), path)
    if _format(path, format, PLACEMENT_FORMATS, "write_placement") == "npy":
        with arrays.writing(path) as file:
            np.lib.format.write_array(file, ids, allow_pickle=False)
        return
    text.write_json(path, sglang.object_of_placement(ids, path))


def _trace_format(path: PathLike, format: str | None) -> str:
    return _format(path, format, TRACE_FORMATS, "read_trace")


def _format(path: PathLike, format: str | None, known: tuple[str, ...], function: str) -> str:
    name = format or _BY_SUFFIX.get(os.path.splitext(path)[1].lower())
    require(
        name in known,
        f"`{function}(format=...)` must be one of {', '.join(known)}",
        f"format={format!r} for {path}",
        "Name the format; the file's ending does not tell it.",
    )
    return str(name)
