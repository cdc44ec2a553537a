"""Arrays from files: without pickle, and without trust in what a file says of itself."""

import io
import struct
import zipfile

import numpy as np
import pytest

from eplb_core import EplbError
from eplb_core._npz import read_npy, read_npz, write_npz


def refuse(path, message):
    with pytest.raises(EplbError, match=message) as caught:
        read_npz(path)
    assert str(path) in str(caught.value)


def test_objects_are_neither_read_nor_written(tmp_path):
    objects = np.asarray([{"a": 1}], dtype=object)
    np.save(tmp_path / "array.npy", objects)
    with pytest.raises(EplbError, match="an array of object"):
        read_npy(tmp_path / "array.npy")
    with pytest.raises(ValueError, match="Object arrays"):
        write_npz(tmp_path / "arrays.npz", objects=objects)


def test_many_small_arrays_count_together(tmp_path):
    path = tmp_path / "many.npz"
    write_npz(path, **{f"a{i}": np.zeros(1000, dtype=np.uint8) for i in range(20)})
    assert len(read_npz(path, limit_bytes=30_000)) == 20
    with pytest.raises(EplbError, match="at most 20000 bytes"):
        read_npz(path, limit_bytes=20_000)


def npz_with(member: bytes, name="physical_to_logical.npy", **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, member)
    return file.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header.encode() + data


HEADER = "{'descr': '<i4', 'fortran_order': False, 'shape': (%s), }\n"


TWO = b"\0" * 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz_with(npy(HEADER % "1099511627776,", TWO)), "8 bytes of data for the shape"),
        (npz_with(npy(HEADER % "-2, -1", TWO)), r"shape \(-2, -1\)"),
        (npz_with(npy(HEADER % "3,", TWO)), "8 bytes of data"),
        (npz_with(npy(HEADER % "1,", TWO)), "8 bytes of data"),
        (npz_with(npy("__import__('os').abort()\n")), "malformed node"),
        (npz_with(npy("{'descr': '<i4'}\n")), "keys"),
        (npz_with(npy("(" * 5000 + "\n")), "EOF in multi-line|too many nested"),
        (npz_with(npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (2,), }\n", TWO)), "'a'"),
        (npz_with(npy(HEADER % "2,", TWO, version=b"\x03\x00")), "cannot be read"),
        (npz_with(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), "EOF|header"),
        (npz_with(b""), "EOF|magic"),
        (npz_with(b"text", name="a.txt"), "arrays only.*a.txt"),
        (npz_with(npy(HEADER % "2,", TWO), compression=zipfile.ZIP_LZMA), "arrays only"),
        (npz_with(npy(HEADER % "2,", TWO), compression=zipfile.ZIP_BZIP2), "arrays only"),
        (b"", "not a zip file"),
        (b"PK\x05\x06", "not a zip file"),
    ],
    ids=range(16),
)
def test_malformed_archives_are_refused(tmp_path, content, message):
    path = tmp_path / "arrays.npz"
    path.write_bytes(content)
    with pytest.raises(EplbError, match=f"arrays.npz.*(?:{message})"):
        read_npz(path)


def test_the_archive_that_those_cases_spoil_is_fine(tmp_path):
    path = tmp_path / "arrays.npz"
    path.write_bytes(npz_with(npy(HEADER % "2,", TWO)))
    assert read_npz(path)["physical_to_logical"].tolist() == [0, 0]


def test_arrays_of_the_same_name_are_refused(tmp_path):
    path = tmp_path / "state.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(HEADER % "2,", b"\0" * 8))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(HEADER % "2,", b"\1" * 8))
    refuse(path, "arrays only, each once")


def test_a_directory_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "state.npz"
    content = bytearray(npz_with(b"") + b"\0" * 2**21)
    # The end record says that the directory takes two megabytes.
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**21, 0, 0)
    path.write_bytes(bytes(content) + end)
    refuse(path, "a directory of 2097152 bytes")


def test_a_changed_byte_of_data_is_noticed(tmp_path):
    path = tmp_path / "state.npz"
    np.savez(path, physical_to_logical=np.arange(1000))  # stored without compression
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refuse(path, "Bad CRC-32")


def test_arrays_of_numpy_are_read(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.asarray(["x", "ü"]),
        "c": np.asarray(3),
        "d": np.zeros((0, 2)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "arrays.npz", **arrays)
        loaded = read_npz(tmp_path / "arrays.npz")
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)
            assert loaded[name].dtype == array.dtype
    np.save(tmp_path / "a.npy", arrays["a"])
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), arrays["a"])


def test_text_with_impossible_characters_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    np.savez(path, physical_to_logical=np.asarray([0x110000], dtype="<u4").view("<U1"))
    refuse(path, "not in range|character")
