"""`.csv` counts: rows `window,layer,expert,count` under a header, or one window as a bare matrix."""

import math
import warnings
from typing import Any, BinaryIO, Literal

import numpy as np

from eplb_core._checks import require
from eplb_core._files import PathLike, reading, writing
from eplb_core.formats.values import MOST_EXPERTS, layer_ids_of, load_of

_BYTES_PER_CHARACTER = 16
"""What parsing takes at worst: `0,0,0,0` and a line's end become integers, and their places."""

_MARK = "\ufeff".encode()
_LONGEST_HEADER = 2**20
_COLUMNS = ("window", "layer", "expert", "count")


def read_csv(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return load and metadata of a table; `layer_ids` are metadata where they are not `0, 1, ...`.

    With a header, `window` may be missing for one window, columns come in any order, and a count that is not listed
    is 0. Windows and layers are those that are listed, sorted; experts go from 0 to the largest listed.
    """
    with reading(path, limit_bytes // _BYTES_PER_CHARACTER) as file:
        start = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
        file.seek(start)
        first = file.readline(_LONGEST_HEADER).decode().strip()
        names = [name.strip().strip('"').lower() for name in first.split(",")]
        if set(names) & set(_COLUMNS):
            return _from_rows(_rows(file, names, path), path, limit_bytes)
        file.seek(start)
        return load_of(_numbers(file, 2, np.int64, np.float64), path), {}


def write_csv(path: PathLike, load: np.ndarray, layer_ids: list[int]) -> None:
    """Write every count as a row, zeros included."""
    with writing(path) as file:
        file.write(f"{','.join(_COLUMNS)}\n".encode())
        for window, rows in enumerate(load.tolist()):
            lines = (
                f"{window},{layer},{expert},{count}\n"
                for layer, row in zip(layer_ids, rows, strict=True)
                for expert, count in enumerate(row)
            )
            file.write("".join(lines).encode())


def _rows(file: BinaryIO, names: list[str], path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Return integers `[rows, 3]` (window, layer, expert) and counts `[rows]`."""
    require(
        sorted(names) in (sorted(_COLUMNS), sorted(_COLUMNS[1:])),
        f"`{path}` must have the columns {', '.join(_COLUMNS)}",
        f"{names[:8]}",
        "Name them in the first line; `window` may be left out if there is one.",
    )
    integers = [(name, np.int64) for name in names]
    fractions = [(name, np.float64 if name == "count" else np.int64) for name in names]
    rows = _numbers(file, 1, np.dtype(integers), np.dtype(fractions))
    window = rows["window"] if "window" in names else np.zeros(len(rows), np.int64)
    return np.stack([window, rows["layer"], rows["expert"]], axis=1), rows["count"]


def _from_rows(table: tuple[np.ndarray, np.ndarray], path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict]:
    keys, counts = table
    require(
        bool((keys >= 0).all() and (keys[:, 2] < MOST_EXPERTS).all()),
        f"`{path}` must number windows, layers and experts from 0, experts below {MOST_EXPERTS}",
        f"{keys.min(axis=0).tolist()} to {keys.max(axis=0).tolist()}",
        "Check the columns' order.",
    )
    windows, layers = (np.unique(keys[:, column]) for column in (0, 1))
    shape = (len(windows), len(layers), int(keys[:, 2].max()) + 1)
    require(
        math.prod(shape) * 8 <= limit_bytes,
        f"`{path}` must unpack to at most {limit_bytes} bytes",
        f"windows, layers, experts = {shape}",
        "Raise the limit if you trust the file.",
    )
    index = (np.searchsorted(windows, keys[:, 0]), np.searchsorted(layers, keys[:, 1]), keys[:, 2])
    flat = np.ravel_multi_index(index, shape)
    ordered = np.sort(flat)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    positions = [tuple(int(i) for i in np.unravel_index(i, shape)) for i in twice[:4]]
    require(
        not positions,
        f"`{path}` must have one row per window, layer and expert",
        f"{len(twice)} repeated, first {positions}",
        "Add the counts of several ranks before writing them.",
    )
    load = np.zeros(math.prod(shape), counts.dtype)
    load[flat] = counts
    ids = layer_ids_of(layers.tolist(), path)
    return load_of(load.reshape(shape), path), {} if ids == list(range(len(ids))) else {"layer_ids": ids}


def _numbers(file: BinaryIO, ndmin: Literal[1, 2], *dtypes: Any) -> np.ndarray:
    """Parse what is left of the file as the first of `dtypes` that does it."""
    start = file.tell()
    if not file.read(2**16).strip():
        raise ValueError("no numbers")
    for dtype in dtypes:
        file.seek(start)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # some releases of NumPy cut fractions off, and only warn
                return np.loadtxt(file, dtype=dtype, delimiter=",", comments=None, encoding="utf-8", ndmin=ndmin)
        except (ValueError, Warning):
            if dtype is dtypes[-1]:
                raise
    raise AssertionError
