"""`.npz` traces and `.npy` arrays: whole, or window by window when they are larger than memory."""

import io
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_core import _npz, _ops
from eplb_core._checks import require
from eplb_core._files import PathLike, reading, writing
from eplb_core.formats.values import load_of, metadata_of

_ANY_SIZE = 2**63
_MEMBER = "load.npy"
_MOST_METADATA = 2**24  # characters of `meta`, or entries of an array beside it


def names_of(path: PathLike) -> list[str]:
    """Return the names of an `.npz`'s arrays."""
    with reading(path, _ANY_SIZE) as file, zipfile.ZipFile(_npz._SmallReads(file)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz_trace(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return load and metadata of an `.npz` trace."""
    arrays = _npz.read_npz(path, limit_bytes=limit_bytes)
    _check_names(arrays, path)
    load = load_of(arrays.pop("load"), path)
    return load, _metadata(arrays, path)


def read_npz_metadata(path: PathLike, limit_bytes: int) -> dict[str, Any]:
    """Return the metadata of an `.npz` trace, however large its load is."""
    arrays = {}
    with reading(path, _ANY_SIZE) as file, zipfile.ZipFile(_npz._SmallReads(file)) as archive:
        _check_names([name.removesuffix(".npy") for name in archive.namelist()], path)
        members = [member for member in archive.infolist() if member.filename != _MEMBER]
        require(
            sum(member.file_size for member in members) <= limit_bytes,
            f"`{path}` must have metadata of at most {limit_bytes} bytes",
            "more",
            "Raise the limit if you trust the file.",
        )
        for member in members:
            with archive.open(member) as stream:
                arrays[member.filename.removesuffix(".npy")] = _npz._read_array(stream, member.file_size)
    return _metadata(arrays, path)


def write_npz_trace(path: PathLike, load: np.ndarray, metadata: dict[str, Any]) -> None:
    """Write load and metadata to an `.npz` trace."""
    _npz.write_npz(path, load=load, meta=np.asarray(json.dumps(metadata)))


def write_npy(path: PathLike, array: np.ndarray) -> None:
    """Write an array to an `.npy`."""
    with writing(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def iter_npz_windows(path: PathLike, limit_bytes: int) -> Iterator[np.ndarray]:
    """Yield `[layers, experts]` for each window of an `.npz` trace; one window is in memory at a time."""
    with reading(path, _ANY_SIZE) as file, zipfile.ZipFile(_npz._SmallReads(file)) as archive:
        _check_names([name.removesuffix(".npy") for name in archive.namelist()], path)
        member = archive.getinfo(_MEMBER)
        require(
            member.compress_type in _npz._METHODS,
            f"`{path}` must be stored or deflated",
            "another method",
            "Repack it.",
        )
        with archive.open(member) as stream:
            yield from _iter_windows(stream, member.file_size, path, limit_bytes)


def iter_npy_windows(path: PathLike, limit_bytes: int) -> Iterator[np.ndarray]:
    """Yield `[layers, experts]` for each window of an `.npy` array."""
    with reading(path, _ANY_SIZE) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        yield from _iter_windows(file, size, path, limit_bytes)


def write_npz_windows(path: PathLike, windows: Iterable[Any], metadata: dict[str, Any]) -> None:
    """Write an `.npz` trace from windows `[layers, experts]`, one in memory at a time."""
    require(isinstance(windows, Iterable), f"`{path}` must get windows", type(windows).__name__, "Give an array.")
    with tempfile.TemporaryFile(dir=Path(path).resolve().parent) as spool:
        shape: tuple[int, ...] | None = None
        count = 0
        for window in windows:
            load = load_of(_ops.as_array(window), f"{path}: window {count}")
            require(
                len(load) == 1 and shape in (None, load.shape[1:]),
                f"`{path}` must get windows `[layers, experts]` of one shape",
                f"{load.shape} as window {count}, {shape} before",
                "Write traces of different models to different files.",
            )
            shape, count = load.shape[1:], count + 1
            spool.write(load.tobytes())
        require(shape is not None, f"`{path}` must get at least one window", "none", "Record one.")
        assert shape is not None
        spool.seek(0)
        header = {"descr": "<i8", "fortran_order": False, "shape": (count, *shape)}
        with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open(_member(_MEMBER), "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                shutil.copyfileobj(spool, stream, 2**20)
            with archive.open(_member("meta.npy"), "w") as stream:
                np.lib.format.write_array(stream, np.asarray(json.dumps(metadata)), allow_pickle=False)


def _check_names(names: Collection[str], path: PathLike) -> None:
    """Refuse what is not a trace; a snapshot has both a placement and, in some form, a load."""
    require(
        "load" in names and "physical_to_logical" not in names,
        f"`{path}` must be a trace, with an array `load`",
        f"arrays {sorted(names)[:8]}",
        "Name it so, or give the array as an .npy file. A placement is not a trace.",
    )


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # its date is fixed, so equal traces give equal files
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def _iter_windows(stream: Any, num_bytes: int, path: PathLike, limit_bytes: int) -> Iterator[np.ndarray]:
    shape, dtype = _header(stream, num_bytes)
    windows, *window_shape = shape if len(shape) == 3 else (1, *shape)
    window_bytes = math.prod(window_shape) * dtype.itemsize
    require(
        window_bytes <= limit_bytes,
        f"`{path}` must have windows of at most {limit_bytes} bytes",
        f"{window_bytes} bytes",
        "Raise the limit if you trust the file.",
    )
    load_of(np.zeros([min(size, 1) for size in shape], dtype), path)  # refuses the rank, an empty axis, the dtype
    for _ in range(windows):
        data = _read_exactly(stream, window_bytes)
        yield load_of(np.frombuffer(data, dtype).reshape(window_shape), path)[0]
    stream.read(1)  # reaching the end compares the checksum


def _header(stream: Any, num_bytes: int) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read_header(stream)
    if column_major and len(shape) > 1:
        raise ValueError("an array in column-major order, which has no windows to read one by one; read it whole")
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} of shape {shape}")
    if math.prod(shape) * dtype.itemsize != num_bytes - stream.tell():
        raise ValueError(f"{num_bytes - stream.tell()} bytes of data for the shape {shape} of {dtype}")
    return shape, dtype


def _read_exactly(stream: Any, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        piece = stream.read(min(size - len(data), 2**20))
        if not piece:
            raise EOFError("the file ends within a window")
        data += piece
    return data


def meta_of(arrays: dict[str, np.ndarray], path: PathLike) -> dict[str, Any]:
    """Return the JSON object that `meta` holds as text; empty if there is none."""
    text = arrays.get("meta", np.asarray("{}"))
    require(
        text.shape == () and text.dtype.kind == "U" and text.nbytes <= 4 * _MOST_METADATA,
        f"`{path}` must have one text of at most {_MOST_METADATA} characters as `meta`",
        f"{text.dtype} of shape {text.shape}",
        "Write it as JSON.",
    )
    try:
        meta: Any = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        meta = f"{error}"
    require(isinstance(meta, dict), f"`{path}` must have a JSON object as `meta`", f"{meta}"[:80], "Write {} if empty.")
    return dict(meta)


def _metadata(arrays: dict[str, np.ndarray], path: PathLike) -> dict[str, Any]:
    """`meta`, and small arrays beside it (labels, layer numbers) under their names."""
    beside = {
        name: array.tolist()
        for name, array in arrays.items()
        if name != "meta" and array.ndim <= 1 and array.size <= _MOST_METADATA and array.dtype.kind in "biufU"
    }
    return metadata_of(beside | meta_of(arrays, path), path)
