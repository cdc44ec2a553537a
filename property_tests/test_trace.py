"""Files of loads and placements: what is written is read back, and what is damaged is refused."""

import io
import json
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eplb_core import EMPTY, EplbError, Topology, plan_moves, schedule_rounds
from eplb_core.testing import placement_pairs, placements, read_only, topologies
from eplb_core.trace import (
    PLACEMENT_FORMATS,
    TRACE_FORMATS,
    Trace,
    iter_windows,
    read_metadata,
    read_placement,
    read_plan,
    read_trace,
    write_placement,
    write_plan,
    write_trace,
)

LIMIT = 2**22
NEEDS = {"sglang-pt": "torch", "tensorrt-llm": "yaml", "pt": "torch", "yaml": "yaml"}
SUFFIX = {"sglang": "json", "sglang-pt": "pt", "tensorrt-llm": "yaml", "vllm-ascend": "json"}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@contextmanager
def file(suffix, content=None):
    """A path in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{suffix}"
        if content is not None:
            path.write_bytes(content)
        yield path


def path_of(format):
    need(format)
    return file(SUFFIX.get(format, format))


@st.composite
def loads(draw, largest=2**40):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)))
    return read_only(draw(hnp.arrays(np.int64, shape, elements=st.integers(0, largest))))


@st.composite
def layer_numbers(draw, count):
    return sorted(draw(st.sets(st.integers(0, 30), min_size=count, max_size=count)))


# Round trips


@pytest.mark.parametrize("format", TRACE_FORMATS)
@given(data=st.data())
def test_a_trace_is_read_back_as_it_was_written(format, data):
    load = data.draw(loads())
    if format == "sglang-pt":  # trailing windows without tokens are room that the recorder did not use
        load = read_only(np.concatenate([load, np.ones_like(load[:1])]))
    with path_of(format) as path:
        write_trace(path, load, format=format)
        for trace in (read_trace(path), read_trace(path, format=format)):
            np.testing.assert_array_equal(trace.load, load)
            assert trace.load.dtype == np.int64
        np.testing.assert_array_equal(np.stack(list(iter_windows(path))), load)
        assert read_metadata(path) == read_trace(path).metadata


@pytest.mark.parametrize("format", ["npz", "json"])
@given(loads(), st.dictionaries(st.text().filter(lambda name: name != "layer_ids"), json_values, max_size=3))
def test_metadata_is_read_back_as_it_was_written(format, load, metadata):
    with path_of(format) as path:
        write_trace(path, Trace(load, metadata))
        assert read_trace(path).metadata == metadata == read_metadata(path)
        write_trace(path, iter(load), metadata)
        assert read_trace(path).metadata == metadata


@pytest.mark.parametrize("format", TRACE_FORMATS)
@given(data=st.data())
def test_layers_keep_their_numbers_or_take_their_places(format, data):
    load = data.draw(loads().map(lambda load: load + 1))
    numbers = data.draw(layer_numbers(load.shape[1]))
    with path_of(format) as path:
        write_trace(path, load, {"layer_ids": numbers}, format=format)
        found = read_trace(path)
    if format.startswith("sglang"):
        np.testing.assert_array_equal(found.load[:, numbers], load)
        assert found.load.shape[1] == numbers[-1] + 1
        assert found.load.sum() == load.sum()
    else:
        np.testing.assert_array_equal(found.load, load)
        plain = format == "npy" or (format == "csv" and numbers == list(range(len(numbers))))
        assert found.metadata == ({} if plain else {"layer_ids": numbers})


@given(loads(), st.sampled_from(["npz", "npy", "csv", "json"]))
def test_windows_can_be_written_one_by_one(load, format):
    with path_of(format) as path:
        write_trace(path, (window for window in load))
        np.testing.assert_array_equal(read_trace(path).load, load)


@given(loads(), st.booleans())
def test_arrays_of_numpy_are_streamed_whether_packed_or_not(load, packed):
    with file("npz") as path:
        (np.savez_compressed if packed else np.savez)(path, load=load)
        np.testing.assert_array_equal(np.stack(list(iter_windows(path))), load)
        np.testing.assert_array_equal(read_trace(path).load, load)


@pytest.mark.parametrize("format", PLACEMENT_FORMATS)
@given(data=st.data())
def test_a_placement_is_read_back_as_it_was_written(format, data):
    topology = data.draw(topologies())
    num_logical = data.draw(st.integers(1, topology.num_slots))
    ids = data.draw(placements(topology, num_logical, empty=format in ("npz", "npy", "json")))
    with path_of(format) as path:
        write_placement(path, ids, topology, format=format, num_logical=num_logical)
        for found in (read_placement(path), read_placement(path, format=format)):
            np.testing.assert_array_equal(found.physical_to_logical, ids)
            assert found.physical_to_logical.dtype == np.int32
            assert found.info["format"] == format
            assert found.info.get("ep_size", topology.ep_size) == topology.ep_size
            assert found.info.get("num_nodes", topology.num_nodes) == topology.num_nodes
            assert found.info.get("num_logical", num_logical) == num_logical
        assert ("ep_size" in found.info) == (format in ("npz", "vllm-ascend"))


@pytest.mark.parametrize("format", PLACEMENT_FORMATS)
@given(data=st.data())
def test_an_engine_finds_each_layer_of_a_placement(format, data):
    topology = data.draw(topologies())
    ids = data.draw(placements(topology, data.draw(st.integers(1, topology.num_slots))))
    numbers = data.draw(layer_numbers(len(ids)))
    with path_of(format) as path:
        write_placement(path, ids, topology, format=format, layer_ids=numbers)
        found = read_placement(path)
    if format.startswith("sglang"):
        np.testing.assert_array_equal(found.physical_to_logical[numbers], ids)
        assert len(found.physical_to_logical) == numbers[-1] + 1
        others = np.delete(found.physical_to_logical, numbers, axis=0)
        assert (others == np.arange(topology.num_slots) % (ids.max() + 1)).all()
    else:
        np.testing.assert_array_equal(found.physical_to_logical, ids)
        named = format in ("npz", "tensorrt-llm")
        assert found.info.get("layer_ids", list(range(len(ids)))) == (numbers if named else list(range(len(ids))))


@given(placement_pairs(), st.sampled_from(["direct", "node"]), st.booleans())
def test_a_move_plan_is_read_back_as_it_was_written(pair, fan_out, scheduled):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)
    schedule = schedule_rounds(plan, topology) if scheduled else None
    with file("npz") as path:
        write_plan(path, old, new, plan, topology, schedule)
        found = read_plan(path)
    assert found.topology == topology
    for written, read in zip((old, new, *plan), (found.old, found.new, *found.plan), strict=True):
        assert (written is None) == (read is None)
        np.testing.assert_array_equal(written, read)
    assert (found.schedule is None) == (schedule is None)
    for written, read in zip(schedule or (), found.schedule or (), strict=True):
        np.testing.assert_array_equal(written, read)
        assert written.dtype == read.dtype


# Damage


def read(path):
    """What each reader says of a file: a value, or None where it refuses. Nothing else may happen."""
    results, named, most = [], True, 0
    for reader in (read_trace, read_placement, read_metadata, read_plan, lambda *a, **k: list(iter_windows(*a, **k))):
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                results.append(reader(path, limit_bytes=LIMIT))
        except EplbError as error:
            results.append(None)
            named &= path.name in str(error)
        finally:
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert named
    assert most < 8 * LIMIT
    return results


def need(format):
    """Skip where the extra that a format needs is not installed."""
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])


@cache
def valid(format, kind):
    """The bytes of a valid file."""
    need(format)
    rng = np.random.default_rng(len(format))
    with path_of(format) as path:
        if kind == "trace":
            write_trace(path, rng.integers(1, 99, (3, 2, 5)), {"model": "x"}, format=format)
        elif kind == "placement":
            write_placement(path, rng.permuted(np.tile(np.arange(6), (3, 1)), axis=1), Topology(3, 2), format=format)
        else:
            old, new = np.arange(6)[None], np.asarray([[0, 2, 1, 4, 5, 3]])
            plan = plan_moves(old, new, Topology(3, 2))
            write_plan(path, old, new, plan, Topology(3, 2), schedule_rounds(plan, Topology(3, 2)))
        return path.read_bytes()


FILES = [
    *((format, "trace") for format in TRACE_FORMATS),
    *((format, "placement") for format in PLACEMENT_FORMATS),
    ("npz", "plan"),
]


@pytest.mark.parametrize(("format", "kind"), FILES)
@given(data=st.data())
def test_a_truncated_file_is_refused(format, kind, data):
    """Only a CSV cannot tell that it was cut, if that is at the end of a number."""
    content = valid(format, kind)
    length = data.draw(st.integers(0, len(content) - 2))  # the last byte may be a line's end
    with file(SUFFIX.get(format, format), content[:length]) as path:
        found = read(path)
    if format != "csv":
        assert found == [None] * len(found)


@pytest.mark.parametrize(("format", "kind"), FILES)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(format, kind, data):
    content = bytearray(valid(format, kind))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with file(SUFFIX.get(format, format), bytes(content)) as path:
        read(path)


@pytest.mark.parametrize("suffix", ["npz", "npy", "json", "csv", "pt", "yaml"])
@given(data=st.data())
def test_any_bytes_are_refused_or_read(suffix, data):
    start = data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"[[", b"layer,expert,count\n", b"{"]))
    with file(suffix, start + data.draw(st.binary(max_size=60))) as path:
        read(path)


KEYS = ["load", "metadata", "logical_count", "physical_to_logical_map", "moe_layer_count", "layer_list", "layer_id"]
KEYS += [
    "device_count",
    "device_list",
    "device_id",
    "device_expert",
    "initial_global_assignments",
    "num_slots",
    "ep_size",
]
KEYS += ["moe_config", "load_balancer", "records", "last_physical_to_logical_map", "rank", "forward_pass_id"]
KEYS += ["global_physical_count", "0", "1", "<<"]
numbers = st.integers(-2, 5) | st.sampled_from([2**31, 2**63, -(2**64), 10**30]) | st.floats(-1, 9) | st.booleans()
near_valid = st.recursive(
    numbers | st.none() | st.sampled_from(["", "1", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=20,
)


@given(near_valid)
@example({"layer_list": [{"device_count": [], "device_list": [{"device_expert": [0]}]}]})
@example({"layer_list": [{"device_list": [{"device_expert": {"0": 1}}]}]})
@example({"load": [[[1]]], "metadata": {"layer_ids": [2**40]}})
@example([[[[1]]]])
def test_any_json_is_refused_or_read(value):
    with file("json", json.dumps(value).encode()) as path:
        read(path)


@given(near_valid | st.dictionaries(st.integers(0, 3) | st.sampled_from(KEYS), near_valid))
def test_any_yaml_is_refused_or_read(value):
    yaml = pytest.importorskip("yaml")
    for content in (value, {"num_slots": 2, "initial_global_assignments": value}):
        with file("yaml", yaml.safe_dump(content).encode()) as path:
            read(path)


@given(near_valid, st.sampled_from(["records", "logical_count", "physical_to_logical_map"]))
def test_any_torch_file_is_refused_or_read(value, key):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    tensor = torch.ones((1, 2), dtype=torch.int64)
    torch.save({key: value, "last_physical_to_logical_map": tensor, "global_physical_count": tensor}, buffer)
    with file("pt", buffer.getvalue()) as path:
        read(path)


headers = st.tuples(
    st.sampled_from(
        ["<i8", "<f8", "|O", "<U4", "|V8", "<M8[s]", "|b1", "<c16", "<f2", ">i4", "|S3", "[('a','<i8')]", "<i9"]
    ),
    st.booleans(),
    st.lists(st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**62, 2**70]), max_size=4).map(tuple),
)


@given(headers, st.binary(max_size=80), st.sampled_from(["npy", "npz"]), st.booleans())
def test_a_header_may_claim_anything(header, content, suffix, packed):
    dtype, column_major, shape = header
    text = f"{{'descr': {dtype!r}, 'fortran_order': {column_major}, 'shape': {shape!r}}}\n".encode()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name in ("load", "physical_to_logical", "old", "new", "source_slot"):
            archive.writestr(f"{name}.npy", array)
    with file(suffix, array if suffix == "npy" else buffer.getvalue()) as path:
        read(path)


fractions = st.floats(0, 2**50) | st.floats(0, 300) | st.integers(0, 300)


@given(hnp.arrays(np.float64, (2, 2, 3), elements=fractions))
def test_fractions_are_rounded_where_that_changes_a_window_by_at_most_one_percent(load):
    windows = [[float(x) for x in window.flat] for window in load]
    kept = all(sum(abs(round(x) - x) for x in window) <= 0.01 * sum(window) for window in windows)
    with file("npy") as path:
        np.save(path, load)
        if kept:
            np.testing.assert_array_equal(read_trace(path).load.reshape(2, 6), [[round(x) for x in w] for w in windows])
        else:
            with pytest.raises(EplbError, match="more than 1%"):
                read_trace(path)


@given(loads(), st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 2.0**63]), st.data())
def test_what_is_no_count_is_refused(load, bad, data):
    wrong = load.astype(np.float64)
    wrong[tuple(data.draw(st.integers(0, size - 1)) for size in load.shape)] = bad
    with file("npy") as path:
        np.save(path, wrong)
        for reader in (read_trace, lambda path: list(iter_windows(path))):
            with pytest.raises(EplbError, match="NaN or infinity|negative|2\\*\\*63"):
                reader(path)
        with pytest.raises(EplbError, match="NaN or infinity|negative|2\\*\\*63"):
            write_trace(path, wrong)


@given(loads(largest=9), st.data())
def test_rows_of_a_csv_come_in_any_order_and_zeros_may_be_missing(load, data):
    load = read_only(np.concatenate([load, np.ones_like(load[..., :1])], axis=2))  # the last expert is listed
    rows = [(*index, count) for index, count in np.ndenumerate(load) if count]
    columns = data.draw(st.permutations(range(4)))
    lines = [",".join(str(row[column]) for column in columns) for row in data.draw(st.permutations(rows))]
    names = [("window", "layer", "expert", "count")[column] for column in columns]
    with file("csv", "\n".join([",".join(names), *lines]).encode()) as path:
        np.testing.assert_array_equal(read_trace(path).load, load)


@given(placement_pairs(), st.integers(1, 3), st.data())
def test_devices_with_fewer_experts_get_empty_slots(pair, num_layers, data):
    topology, _, ids, _ = pair
    devices = ids[0].reshape(topology.ep_size, -1).tolist()
    kept = [row[: data.draw(st.integers(0, len(row)))] for row in devices]
    kept[data.draw(st.integers(0, len(kept) - 1))] = devices[0]
    layers = [{"device_list": [{"device_expert": row} for row in kept]}] * num_layers
    with file("json", json.dumps({"moe_layer_count": num_layers, "layer_list": layers}).encode()) as path:
        found = read_placement(path).physical_to_logical
    expected = [slot for row in kept for slot in row + [EMPTY] * (topology.slots_per_rank - len(row))]
    assert found.tolist() == [expected] * num_layers
