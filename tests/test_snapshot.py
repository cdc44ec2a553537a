"""State survives a restart, whole or not at all, and files are not trusted."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from eplb_core import EMPTY, EplbError, Topology, rebalance, round_robin
from eplb_core import _files as files
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


@pytest.mark.parametrize(
    "estimator", [sliding_window(3), exponential_decay(2.5), trend_forecast(4)], ids=["window", "decay", "trend"]
)
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


def test_a_plan_made_elsewhere_can_be_started_from(path):
    load = np.random.default_rng(0).integers(0, 100, (2, 10))
    save_snapshot(path, SNAPSHOT._replace(physical_to_logical=rebalance(load, TOPOLOGY)))
    np.testing.assert_array_equal(load_snapshot(path, TOPOLOGY).physical_to_logical, rebalance(load, TOPOLOGY))
