"""Arrays in `.npz` and `.npy` files, without pickle and without trust in the sizes that a file claims."""

import io
import math
import zipfile
from typing import IO, Any

import numpy as np

from eplb_core._checks import listing, require
from eplb_core._files import PathLike, reading, writing

LIMIT_BYTES = 2**30
"""What is read at most, unless told otherwise."""

_LARGEST_READ = 2**20
_KINDS = "biufcSU"  # bool, integers, floats, complex, bytes, text: nothing that unpickles or nests
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may allocate gigabytes before the first byte


def read_npz(path: PathLike, *, limit_bytes: int = LIMIT_BYTES) -> dict[str, np.ndarray]:
    """Read all arrays of an `.npz`, by name.

    Sizes are looked at before anything is unpacked, so a small file cannot unfold into a large one, and headers
    before data, so nothing is unpickled. Checksums are compared.

    Args:
        path: written by `write_npz`, `numpy.savez` or `numpy.savez_compressed`.
        limit_bytes: most bytes of the file, and of all its arrays together.

    Raises:
        EplbError: naming the file, if it is missing, larger than the limit, damaged, or holds anything but arrays
            of numbers and text.
    """
    with reading(path, limit_bytes) as file, zipfile.ZipFile(_SmallReads(file)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        claimed = sum(member.file_size for member in members)
        odd = [m.filename for m in members if not m.filename.endswith(".npy") or m.compress_type not in _METHODS]
        require(
            not odd and len(set(names)) == len(names),
            f"`{path}` must hold arrays only, each once",
            listing(odd or names),
            "Write it with numpy.savez.",
        )
        require(
            claimed <= limit_bytes,
            f"`{path}` must unpack to at most {limit_bytes} bytes",
            f"{claimed} bytes",
            "Raise the limit if you trust the file.",
        )
        arrays = {}
        for member in members:
            with archive.open(member) as stream:
                arrays[member.filename.removesuffix(".npy")] = _read_array(stream, member.file_size)
        return arrays


def read_npy(path: PathLike, *, limit_bytes: int = LIMIT_BYTES) -> np.ndarray:
    """Read the array of an `.npy`, as carefully as `read_npz`.

    Raises:
        EplbError: as `read_npz`.
    """
    with reading(path, limit_bytes) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_array(file, size)


def write_npz(path: PathLike, /, **arrays: Any) -> None:
    """Write arrays to a compressed `.npz` that takes the place of `path` at once. Equal arrays give equal bytes.

    Raises:
        OSError: if the file cannot be written; `path` is unchanged then.
        ValueError: if an array holds objects, which would need pickle.
    """
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def _read_array(stream: Any, num_bytes: int) -> np.ndarray:
    """The array in a stream that holds `num_bytes`, its header included."""
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read_header(stream)
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise ValueError(f"an array of {dtype}, where numbers or text are expected")
    data_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or data_bytes != num_bytes - stream.tell():
        raise ValueError(f"{num_bytes - stream.tell()} bytes of data for the shape {shape} of {dtype}")
    data = np.empty(data_bytes, dtype=np.uint8)
    for start in range(0, data_bytes, _LARGEST_READ):
        piece = data[start : start + _LARGEST_READ]
        piece[:] = np.frombuffer(stream.read(piece.size), dtype=np.uint8)
    array = data.view(dtype).reshape(shape, order="F" if column_major else "C")
    if dtype.kind == "U":
        array.tolist()  # raises where a code point does not exist
    return array


class _SmallReads(io.BufferedReader):
    """Refuses the one read whose size a ZIP archive chooses, that of its directory, where it is absurd."""

    def __init__(self, file: IO[bytes]):
        super().__init__(io.FileIO(file.fileno(), closefd=False))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_READ:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(size)
