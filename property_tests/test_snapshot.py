import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from eplb_core import EplbError
from eplb_core._npz import read_npz, write_npz
from eplb_core.snapshot import Snapshot, load_snapshot, save_snapshot
from eplb_core.testing import placements, topologies

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
numbers = st.sampled_from(
    ["bool", "int8", "uint16", ">i4", "int64", "uint64", "float16", "float32", "float64"]
).flatmap(
    lambda dtype: arrays(
        dtype,
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        elements={"allow_nan": False, "allow_infinity": False} if "float" in dtype else None,
    )
)
trees = st.recursive(
    numbers | st.none(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def snapshots(draw):
    topology = draw(topologies())
    num_logical = draw(st.integers(1, topology.num_slots))
    placement = draw(placements(topology, num_logical, empty=draw(st.booleans())))
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=3), json_values, max_size=3))
    epoch = draw(st.integers(0, 2**63 - 1))
    return Snapshot(placement, topology, num_logical, epoch, draw(trees), metadata)


def same(a, b) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if a is None:
        return b is None
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def check_error(path):
    """Load the file; if that fails, it is an `EplbError` that names it."""
    message = str(path)
    try:
        load_snapshot(path, allow_lost=True)
    except EplbError as error:
        message = str(error)
    assert str(path) in message


@given(snapshots(), st.sampled_from(["npz", "json"]))
def test_a_snapshot_comes_back_to_the_bit(snapshot, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"state.{suffix}")
        save_snapshot(path, snapshot)
        loaded = load_snapshot(path, snapshot.topology, load_like=snapshot.load, allow_lost=True)
    assert same(loaded.physical_to_logical, snapshot.physical_to_logical)
    assert same(loaded.load, snapshot.load)
    assert (loaded.topology, loaded.num_logical, loaded.epoch) == snapshot[1:4]
    assert loaded.metadata == (snapshot.metadata or {})


@given(snapshots(), st.sampled_from(["npz", "json"]), st.data())
def test_whatever_is_wrong_with_a_file_is_one_kind_of_error(snapshot, suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"state.{suffix}")
        save_snapshot(path, snapshot)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
        path.write_bytes(content)
        check_error(path)


@given(snapshots(), json_values, st.data())
def test_whatever_is_wrong_with_its_content_is_too(snapshot, value, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.json")
        save_snapshot(path, snapshot)
        document = json.loads(path.read_text())
        part = data.draw(st.sampled_from([document, document["arrays"], document["arrays"]["physical_to_logical"]]))
        part[data.draw(st.sampled_from(sorted(part)))] = value
        path.write_text(json.dumps(document))
        check_error(path)


@given(st.dictionaries(st.text("abc/.é", max_size=4), numbers, max_size=4))
def test_arrays_come_back_by_name(named):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "arrays.npz")
        write_npz(path, **named)
        loaded = read_npz(path)
    assert same(loaded, named)
