"""Snapshots from anyone: whatever is wrong with a file is an `EplbError` that names it."""

import json
import os
import pickle

import numpy as np
import pytest

from eplb_core import EplbError
from eplb_core._npz import read_npz, write_npz
from eplb_core.snapshot import load_snapshot, save_snapshot
from tests.test_snapshot import SNAPSHOT


@pytest.fixture(params=["npz", "json"])
def path(request, tmp_path):
    return tmp_path / f"state.{request.param}"


def refuse(path, message=None):
    with pytest.raises(EplbError, match=message) as caught:
        load_snapshot(path)
    assert str(path) in str(caught.value)


def test_other_names_are_refused(tmp_path):
    for call in (lambda p: save_snapshot(p, SNAPSHOT), load_snapshot):
        with pytest.raises(EplbError, match=r"must end in \.npz or \.json; got .*state\.pt"):
            call(tmp_path / "state.pt")


def test_what_is_no_file_is_refused(path):
    refuse(path, "must be a file; got none")
    path.mkdir()
    refuse(path, "must be a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_without_a_writer_does_not_hang(path):
    os.mkfifo(path)
    refuse(path, "must be a file")


def test_a_later_version_is_refused(path, tmp_path):
    save_snapshot(path, SNAPSHOT)
    edit(path, lambda meta: meta | {"snapshot": 2})
    refuse(path, "version 1; got 2. Update eplb")


def edit(path, change):
    """Rewrite the metadata of a snapshot."""
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        arrays = read_npz(path)
        meta = change(json.loads(str(arrays.pop("meta"))))
        write_npz(path, meta=np.asarray(json.dumps(meta)), **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ep_size": 0}, "ep_size"),
        ({"ep_size": "4"}, "ep_size must be .* got '4'"),
        ({"ep_size": None}, "ep_size"),
        ({"num_nodes": 3}, "num_nodes"),
        ({"num_logical": 9}, "allows expert ids 0..8"),
        ({"num_logical": 13}, "num_logical=13, num_slots=12"),
        ({"num_logical": 10**15}, "num_logical must be"),
        ({"epoch": -3}, "epoch must be"),
        ({"epoch": 2.5}, "epoch must be"),
        ({"slots_per_rank": 4}, "16 slots"),
        ({"load": ["load.0"]}, "'load.0'"),
        ({"load": [3]}, "must name arrays"),
        ({"metadata": 3}, "dict of JSON values"),
    ],
    ids=str,
)
def test_impossible_contents_are_refused(path, change, message):
    save_snapshot(path, SNAPSHOT)
    edit(path, lambda meta: meta | change)
    refuse(path, message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "{}",
        '{"snapshot": 1}',
        '{"snapshot": 1, "arrays": {"physical_to_logical": [[0]]}}',
        '{"snapshot": NaN, "arrays": {}}',
        "[" * 200_000,
        '{"snapshot": ' + "9" * 10_000 + "}",
        "\ud800",
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_no_snapshot_is_refused(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refuse(path)


VALUES = SNAPSHOT.physical_to_logical.ravel().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [v + 0.5 for v in VALUES]}, "numbers of its dtype"),
        ({"values": [v + 2**32 for v in VALUES]}, "numbers of its dtype"),
        ({"values": [v + 2**64 for v in VALUES]}, "64 bits|object"),
        ({"values": [True] * 24}, "numbers"),
        ({"values": [str(v) for v in VALUES]}, "numbers"),
        ({"values": [VALUES]}, "numbers of its dtype"),
        ({"values": VALUES[1:]}, "reshape"),
        ({"values": "0" * 24}, "a list of numbers"),
        ({"shape": [2, -1]}, "shape"),
        ({"shape": "2"}, "cannot be read"),
        ({"dtype": "|b1"}, "numbers of its dtype"),
        ({"dtype": "O"}, "got dtype 'O'"),
        ({"dtype": "(1000000000,)i8"}, "got dtype"),
        ({"dtype": "<f16"}, "got dtype"),
        ({"dtype": 3}, "got dtype 3"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_arrays_in_json_are_checked(tmp_path, change, message):
    path = tmp_path / "state.json"
    save_snapshot(path, SNAPSHOT)
    value = json.loads(path.read_text())
    assert value["arrays"]["physical_to_logical"] == {"dtype": "<i4", "shape": [2, 12], "values": VALUES}
    value["arrays"]["physical_to_logical"] |= change
    path.write_text(json.dumps(value))
    refuse(path, message)


@pytest.mark.parametrize("key", ["dtype", "shape", "values"])
def test_arrays_in_json_are_complete(tmp_path, key):
    path = tmp_path / "state.json"
    save_snapshot(path, SNAPSHOT)
    value = json.loads(path.read_text())
    del value["arrays"]["physical_to_logical"][key]
    path.write_text(json.dumps(value))
    refuse(path, key)


class Trap:
    def __reduce__(self):
        return os.abort, ()


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "state.npz"
    objects = np.asarray([Trap()], dtype=object)
    np.savez(path, physical_to_logical=objects, meta=np.asarray("{}"))
    refuse(path, "an array of object")
    path.write_bytes(pickle.dumps(Trap()))
    refuse(path, "not a zip file")


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path):
    path = tmp_path / "state.npz"
    write_npz(path, physical_to_logical=np.zeros(2**28, dtype=np.uint8), meta=np.asarray("{}"))
    assert path.stat().st_size < 2**19
    refuse(path, "must unpack to at most 67108864 bytes; got 268435720 bytes")


def test_a_large_file_is_not_read(path):
    save_snapshot(path, SNAPSHOT)
    with pytest.raises(EplbError, match=r"must have at most \d+ bytes; got \d+ bytes"):
        load_snapshot(path, limit_bytes=64)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_load_that_is_not_finite_is_refused(tmp_path, number):
    path = tmp_path / "state.npz"
    save_snapshot(path, SNAPSHOT._replace(load=np.zeros(2)))
    write_npz(path, **read_npz(path) | {"load.0": np.asarray([0.0, number])})
    refuse(path, "`load.0` must be an array of finite numbers")
