"""State survives a restart, whole or not at all, and files are not trusted."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from eplb_core import EMPTY, EplbError, Topology, rebalance, round_robin
from eplb_core import _files as files
from eplb_core._npz import read_npy, read_npz, write_npz
from eplb_core.load import exponential_decay, sliding_window, trend_forecast
from eplb_core.snapshot import Snapshot, load_snapshot, save_snapshot
from eplb_core.trace import read_placement, write_placement

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3, num_nodes=2)
SNAPSHOT = Snapshot(round_robin(2, 10, TOPOLOGY), TOPOLOGY, 10, epoch=7, metadata={"model": "tiny", "layers": [3, 5]})


def estimated(estimator, windows=5):
    rng = np.random.default_rng(1)
    state = estimator.init(2, 10)
    for _ in range(windows):
        state = estimator.update(state, rng.integers(0, 1000, (2, 10)))
    return state


@pytest.fixture(params=["npz", "json"])
def path(request, tmp_path):
    return tmp_path / f"state.{request.param}"


@pytest.mark.parametrize("estimator", [sliding_window(3), exponential_decay(2.5), trend_forecast(4)], ids=str)
def test_an_estimator_goes_on_where_it_was(path, estimator):
    state = estimated(estimator)
    save_snapshot(path, SNAPSHOT._replace(load=state))
    loaded = load_snapshot(path, TOPOLOGY, load_like=estimator.init(2, 10)).load
    assert type(loaded) is type(state)
    more = np.arange(20).reshape(2, 10)
    for before, after in ((state, loaded), (estimator.update(state, more), estimator.update(loaded, more))):
        np.testing.assert_array_equal(estimator.estimate(before), estimator.estimate(after))
        assert estimator.windows(before) == estimator.windows(after)


RESTART = """
import sys
import numpy as np
from eplb_core import Topology, rebalance, round_robin
from eplb_core.load import exponential_decay
from eplb_core.snapshot import Snapshot, load_snapshot, save_snapshot

path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
topology, estimator = Topology(4, 3, num_nodes=2), exponential_decay(2.0)
state, placement, epoch = estimator.init(2, 10), round_robin(2, 10, topology), 0
if first > 0:
    saved = load_snapshot(path, topology, load_like=state)
    state, placement, epoch = saved.load, saved.physical_to_logical, saved.epoch
for window in range(first, last):
    state = estimator.update(state, np.random.default_rng(window).integers(0, 10 ** (window + 1), (2, 10)))
    placement, epoch = rebalance(estimator.estimate(state), topology, previous=placement), epoch + 1
save_snapshot(path, Snapshot(placement, topology, 10, epoch, load=state))
"""


def test_a_restarted_process_plans_what_one_that_went_on_would_have(path):
    def run(target, first, last):
        arguments = [sys.executable, "-c", RESTART, str(target), str(first), str(last)]
        subprocess.run(arguments, timeout=120, check=True)

    other = path.with_stem("uninterrupted")
    run(path, 0, 3)
    run(path, 3, 6)
    run(other, 0, 6)
    assert path.read_bytes() == other.read_bytes()
    assert load_snapshot(path).epoch == 6


def test_what_is_saved_is_loaded(path):
    save_snapshot(path, SNAPSHOT)
    loaded = load_snapshot(path)
    assert loaded[1:] == SNAPSHOT[1:]
    assert loaded.physical_to_logical.dtype == np.int32
    np.testing.assert_array_equal(loaded.physical_to_logical, SNAPSHOT.physical_to_logical)
    save_snapshot(path, loaded._replace(metadata=None))
    assert load_snapshot(path).metadata == {}


def test_a_snapshot_is_a_placement_and_a_placement_a_snapshot(tmp_path):
    path = tmp_path / "placement.npz"
    save_snapshot(path, SNAPSHOT._replace(load=estimated(sliding_window(2))))
    ids, info = read_placement(path)
    np.testing.assert_array_equal(ids, SNAPSHOT.physical_to_logical)
    assert (info["ep_size"], info["num_nodes"], info["num_logical"]) == (4, 2, 10)
    write_placement(path, ids, TOPOLOGY, num_logical=10)
    loaded = load_snapshot(path, TOPOLOGY)
    np.testing.assert_array_equal(loaded.physical_to_logical, ids)
    assert (loaded.epoch, loaded.load, loaded.num_logical) == (0, None, 10)


def test_hosts_may_change_and_ranks_may_not(path):
    save_snapshot(path, SNAPSHOT)
    assert load_snapshot(path, Topology(4, 3)).topology == Topology(4, 3)
    for other in (Topology(2, 6), Topology(3, 3), Topology(4, 4)):
        with pytest.raises(EplbError, match=r"ep_size=., slots_per_rank=.*saved from Topology\(ep_size=4.*elastic"):
            load_snapshot(path, other)


def test_lost_experts_are_saved_and_loaded_on_request_only(path):
    placement = SNAPSHOT.physical_to_logical.copy()
    placement[1, [3, 4]] = EMPTY
    save_snapshot(path, SNAPSHOT._replace(physical_to_logical=placement))
    with pytest.raises(EplbError, match=r"state\.(npz|json).*\(layer, expert\) pairs \[\(1, 3\), \(1, 4\)\]"):
        load_snapshot(path)
    np.testing.assert_array_equal(load_snapshot(path, allow_lost=True).physical_to_logical, placement)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"physical_to_logical": round_robin(2, 11, TOPOLOGY)}, r"ids \[10\]"),
        ({"topology": Topology(4, 4)}, "16 slots"),
        ({"epoch": -1}, "epoch must be .* got -1"),
        ({"epoch": 1.5}, "epoch must be .* got 1.5"),
        ({"num_logical": True}, "num_logical must be .* got True"),
        ({"load": {"a": [np.asarray([1.0, np.nan])]}}, r"`load\.a\.0` must be .*NaN"),
        ({"load": ("text",)}, r"`load\.0` must be an array"),
        ({"load": {1: np.zeros(1)}}, r"text as keys; got \[1\]"),
        ({"load": np.zeros(1, dtype=np.complex64)}, "complex64"),
        ({"metadata": {"rate": float("nan")}}, "finite numbers"),
    ],
    ids=str,
)
def test_what_could_not_be_loaded_is_not_saved(path, wrong, message):
    save_snapshot(path, SNAPSHOT)
    before = path.read_bytes()
    with pytest.raises(EplbError, match=message):
        save_snapshot(path, SNAPSHOT._replace(**wrong))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (sliding_window(3).init(2, 10), r"`load\.rows|`load` must .* 3 parts|`load"),
        (sliding_window(2).init(2, 9), r"`load\.0\.0` must .*\(2, 9\); got int64 of shape \(2, 10\)"),
        (exponential_decay(1.0).init(2, 10), r"`load\.0` must .*float64"),
        (((np.zeros((2, 10)), np.zeros((2, 10))), np.zeros((), dtype=int)), r"`load\.0\.0` must .*float64.*got int64"),
        ({"a": np.zeros(1)}, r"a dict with the keys \['a'\]; got 2 parts"),
        ((None, np.zeros(())), r"`load\.0` must .*nothing"),
    ],
    ids=["windows", "experts", "estimator", "kind", "structure", "none"],
)
def test_a_load_of_another_kind_is_refused(path, like, message):
    save_snapshot(path, SNAPSHOT._replace(load=estimated(sliding_window(2))))
    with pytest.raises(EplbError, match=message):
        load_snapshot(path, load_like=like)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_load_that_is_not_finite_is_refused(tmp_path, number):
    path = tmp_path / "state.npz"
    save_snapshot(path, SNAPSHOT._replace(load=np.zeros(2)))
    write_npz(path, **read_npz(path) | {"load.0": np.asarray([0.0, number])})
    refuse(path, "`load.0` must be an array of finite numbers")


def test_a_missing_load_is_refused_where_one_is_needed(path):
    save_snapshot(path, SNAPSHOT)
    with pytest.raises(EplbError, match="got nothing"):
        load_snapshot(path, load_like=sliding_window(2).init(2, 10))


def test_names_within_a_load_cannot_collide(path):
    load = {"a.b": np.asarray([1]), "a": {"b": np.asarray([2])}, "": [np.asarray(3)], "none": None}
    save_snapshot(path, SNAPSHOT._replace(load=load))
    loaded = load_snapshot(path, load_like=load).load
    assert (loaded["a.b"], loaded["a"]["b"], loaded[""][0], loaded["none"]) == (1, 2, 3, None)


@pytest.mark.parametrize(
    "array",
    [
        np.asarray([2**63 - 1, -(2**63)]),
        np.asarray([2**64 - 1], dtype=np.uint64),
        np.asarray([0.1, 1e-45, 3e38], dtype=np.float32),
        np.asarray([1e-320, -0.0, 1.7e308]),
        np.asarray([True, False]),
        np.zeros((0, 4)),
        np.asarray(5, dtype=np.int8),
        np.arange(6, dtype=">i2").reshape(2, 3).T,
    ],
    ids=str,
)
def test_numbers_are_kept_to_the_bit(path, array):
    save_snapshot(path, SNAPSHOT._replace(load=array))
    loaded = load_snapshot(path).load
    assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
    assert loaded.tobytes() == array.tobytes()


# Whole or not at all


def test_a_failure_while_writing_leaves_the_old_file(path, monkeypatch):
    save_snapshot(path, SNAPSHOT)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_snapshot(path, SNAPSHOT._replace(epoch=8))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_snapshot(tmp_path / "nowhere" / "state.npz", SNAPSHOT)


def test_a_reader_never_sees_a_part(path):
    save_snapshot(path, SNAPSHOT._replace(epoch=0))
    done = threading.Event()

    def write():
        for epoch in range(1, 40):
            save_snapshot(path, SNAPSHOT._replace(epoch=epoch))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    epochs = []
    while not done.is_set():
        epochs.append(load_snapshot(path).epoch)
    writer.join(timeout=60)
    assert epochs == sorted(epochs)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")
def test_links_are_followed_and_others_may_read(tmp_path):
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    link.symlink_to(real)
    save_snapshot(link, SNAPSHOT)
    assert link.is_symlink()
    assert load_snapshot(real).epoch == 7
    mask = os.umask(0)
    os.umask(mask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~mask


def test_equal_snapshots_are_equal_files(path):
    save_snapshot(path, SNAPSHOT)
    before = path.read_bytes()
    save_snapshot(path, SNAPSHOT)
    assert path.read_bytes() == before


# Hostile files


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
    np.save(tmp_path / "array.npy", objects)
    with pytest.raises(EplbError, match="an array of object"):
        read_npy(tmp_path / "array.npy")
    with pytest.raises(ValueError, match="Object arrays"):
        write_npz(path, objects=objects)


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path):
    path = tmp_path / "state.npz"
    write_npz(path, physical_to_logical=np.zeros(2**28, dtype=np.uint8), meta=np.asarray("{}"))
    assert path.stat().st_size < 2**19
    refuse(path, "must unpack to at most 67108864 bytes; got 268435720 bytes")


def test_many_small_arrays_count_together(tmp_path):
    path = tmp_path / "many.npz"
    write_npz(path, **{f"a{i}": np.zeros(1000, dtype=np.uint8) for i in range(20)})
    assert len(read_npz(path, limit_bytes=30_000)) == 20
    with pytest.raises(EplbError, match="at most 20000 bytes"):
        read_npz(path, limit_bytes=20_000)


def test_a_large_file_is_not_read(path):
    save_snapshot(path, SNAPSHOT)
    with pytest.raises(EplbError, match=r"must have at most \d+ bytes; got \d+ bytes"):
        load_snapshot(path, limit_bytes=64)


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
        (npz_with(npy("(" * 5000 + "\n")), "EOF in multi-line"),
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


def test_a_plan_made_elsewhere_can_be_started_from(path):
    load = np.random.default_rng(0).integers(0, 100, (2, 10))
    save_snapshot(path, SNAPSHOT._replace(physical_to_logical=rebalance(load, TOPOLOGY)))
    np.testing.assert_array_equal(load_snapshot(path, TOPOLOGY).physical_to_logical, rebalance(load, TOPOLOGY))
