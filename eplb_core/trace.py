"""Read and write load traces and placements: our own format and those of engines. The formats are in docs/traces.md."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_core import _ops
from eplb_core._files import PathLike
from eplb_core._npz import LIMIT_BYTES, read_npy
from eplb_core.formats import arrays, sglang, sglang_pt, table, text
from eplb_core.formats.layers import layer_ids_or_range, spread_out
from eplb_core.formats.move_plan import StoredPlan, read_plan, write_plan
from eplb_core.formats.names import choose
from eplb_core.formats.placements import PLACEMENT_FORMATS, StoredPlacement, read_placement, write_placement
from eplb_core.formats.values import blaming, load_of, metadata_of

__all__ = (
    "PLACEMENT_FORMATS",
    "TRACE_FORMATS",
    "StoredPlacement",
    "StoredPlan",
    "Trace",
    "iter_windows",
    "read_metadata",
    "read_placement",
    "read_plan",
    "read_trace",
    "write_placement",
    "write_plan",
    "write_trace",
)

TRACE_FORMATS = ("npz", "npy", "json", "csv", "sglang", "sglang-pt")


class Trace(NamedTuple):
    """Loads recorded over time, and what is known about them.

    load: `[windows, layers, experts]` int64 tokens per logical expert.
    metadata: JSON values by name, such as `model`, `top_k`, `window_tokens`, `labels` or `layer_ids`.
    """

    load: Int[np.ndarray, "windows layers experts"]
    metadata: dict[str, Any]


def read_trace(path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES) -> Trace:
    """Read a load trace of any known format.

    Args:
        path: the file, or for `"sglang-pt"` a folder with the recordings of all ranks.
        format: one of `TRACE_FORMATS`; by default told from the file's name, and for JSON from its keys.
        limit_bytes: most bytes of the file and of what it unpacks to. Text takes more room when it is parsed, so its
            files may have a fraction of this: 1/16 as CSV, 1/32 as JSON.

    Returns:
        `Trace`. Counts `[layers, experts]` are one window. Fractions are rounded to the nearest integer, half to
        even; a window that this would change by more than 1% is refused, as it holds shares and not tokens.

    Raises:
        EplbError: naming the file, if it is missing, damaged, too large, of another format, or holds no load.
    """
    name = choose(path, format, TRACE_FORMATS, "read_trace")
    with blaming(path):
        if name == "npz":
            return Trace(*arrays.read_npz_trace(path, limit_bytes))
        if name == "npy":
            return Trace(load_of(read_npy(path, limit_bytes=limit_bytes), path), {})
        if name == "csv":
            return Trace(*table.read_csv(path, limit_bytes))
        if name == "sglang-pt":
            return Trace(*sglang_pt.read_recording(path, limit_bytes))
        value = text.read_json(path, limit_bytes)
        if "sglang" in (name, text.json_format(value)):
            return Trace(*sglang.load_from_object(value, path))
        return Trace(*text.load_from_json(value, path))


def read_metadata(path: PathLike, *, format: str | None = None, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """Read the metadata of a trace, without its load if it is an `.npz`.

    Args, Raises: as `read_trace`.
    """
    if choose(path, format, TRACE_FORMATS, "read_metadata") == "npz":
        with blaming(path):
            return arrays.read_npz_metadata(path, limit_bytes)
    return read_trace(path, format=format, limit_bytes=limit_bytes).metadata


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
    name = choose(path, format, TRACE_FORMATS, "iter_windows")
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

    What a format has no room for is left out: an `.npz` and our JSON keep all metadata, a `.csv` keeps `layer_ids`,
    and SGLang's formats use them to put each row where the model has that layer, with zeros between.

    Args:
        path: the file to write.
        load: a `Trace`, an array `[windows, layers, experts]` or `[layers, experts]`, or an iterable of windows
            `[layers, experts]`, of which one at a time is in memory if an `.npz` is written.
        metadata: JSON values by name; by default those of the `Trace`.
        format: one of `TRACE_FORMATS`; by default told from the file's name.

    Raises:
        EplbError: if the load or the metadata are not of this form.
        OSError: if the file cannot be written.
    """
    name = choose(path, format, TRACE_FORMATS, "write_trace")
    if isinstance(load, Trace):
        load, metadata = load.load, load.metadata if metadata is None else metadata
    metadata = metadata_of(metadata, path)
    if not hasattr(load, "shape"):
        if name == "npz" and not isinstance(load, list | tuple):
            return arrays.write_npz_windows(path, load, metadata)
        with blaming(path):
            load = np.stack([np.asarray(_ops.as_array(window)) for window in load])
    values = load_of(_ops.as_array(load), path)
    layer_ids = layer_ids_or_range(metadata.get("layer_ids"), values.shape[1], path)
    if name == "npz":
        return arrays.write_npz_trace(path, values, metadata)
    if name == "npy":
        return arrays.write_npy(path, values)
    if name == "csv":
        return table.write_csv(path, values, layer_ids)
    if name == "json":
        return text.write_json(path, {"load": values.tolist(), "metadata": metadata})
    values = spread_out(values, layer_ids, fill=0)
    if name == "sglang":
        return text.write_json(path, {"logical_count": values.tolist()})
    return sglang_pt.write_recording(path, values)
