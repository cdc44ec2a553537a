"""Files as engines write them, and files that mean harm."""

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import traces
from eplb_core import EplbError, Topology
from eplb_core.trace import (
    iter_windows,
    read_metadata,
    read_placement,
    read_plan,
    read_trace,
    write_placement,
    write_trace,
)

MAP = [[0, 1, 2, 3, 1, 0], [3, 2, 1, 0, 2, 2]]


def save(path, value):
    torch = pytest.importorskip("torch")
    torch.save(value, path)
    return path


def tensor(values):
    return pytest.importorskip("torch").tensor(values)


def record(number, rank, counts, **more):
    """A record of SGLang's `per_pass` recorder."""
    common = {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [1, 2],
        "forward_mode": 1,
    }
    return common | {"global_physical_count": tensor(counts)} | more


def test_the_snippet_of_the_documentation_prints_what_it_says(tmp_path):
    pytest.importorskip("yaml")
    text = (Path(__file__).parents[1] / "docs" / "traces.md").read_text(encoding="utf-8")
    ((code, output),) = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == output


# SGLang


def test_a_stat_recording_of_sglang(tmp_path):
    counts = np.arange(48).reshape(4, 3, 4)
    counts[3] = 0
    counts[0] = 0
    value = {"rank": 0, "logical_count": tensor(counts).int(), "average_utilization_rate_over_window": 0.5}
    trace = read_trace(save(tmp_path / "expert_distribution_recorder_1.5.pt", value))
    np.testing.assert_array_equal(trace.load, counts[:3])
    assert trace.metadata == {"recorder": "sglang stat", "unused_windows": 1}


def test_a_detail_recording_of_sglang_counts_slots(tmp_path):
    counts = [[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]]
    records = [record(7, 0, counts), record(5, 0, np.ones((2, 6), int)), record(7, 0, counts, gatherer_key="child_a")]
    value = {"records": records, "last_physical_to_logical_map": tensor(MAP)}
    path = save(tmp_path / "expert_distribution_recorder_1.5_0.pt", value)
    trace = read_trace(path)
    assert trace.load.tolist() == [[[2, 2, 1, 1], [1, 1, 3, 1]], [[14, 14, 6, 8], [80, 60, 260, 20]]]
    assert trace.metadata["forward_pass_ids"] == [5, 7]
    assert "last map" in trace.metadata["note"]
    assert read_placement(path).physical_to_logical.tolist() == MAP


def test_the_recordings_of_all_ranks_are_added(tmp_path):
    for rank in range(3):
        records = [record(number, rank, [[rank + 1, 0, number]]) for number in (0, 1)]
        value = {"records": records, "last_physical_to_logical_map": tensor([[0, 1, 1]])}
        save(tmp_path / f"expert_distribution_recorder_1.5_{rank}.pt", value)
    assert read_trace(tmp_path).load.tolist() == [[[6, 0]], [[6, 3]]]


@pytest.fixture
def released_recorder(tmp_path, monkeypatch):
    """SGLang's own recorder module, dumping to a folder; of the engine around it there are only mocks."""
    torch = pytest.importorskip("torch")
    from benchmarks.released import PeerUnavailable, StandIn, fetch, load

    try:
        root = fetch("sglang==0.5.23", "sglang/srt/eplb")
    except PeerUnavailable as reason:
        pytest.skip(str(reason))
    (module,) = load(root, ["sglang.srt.eplb.expert_distribution"], replace={"einops": StandIn("einops")})
    module.reports_expert_balancedness = lambda: False
    module.get_exec().moe.eplb_min_rebalancing_utilization_threshold = 1.0
    module.get_exec().moe.expert_distribution_recorder_buffer_size = 8
    module.get_device_namespace().device = "cpu"
    module.envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get.return_value = str(tmp_path / "recordings")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace(empty_cache=lambda: None))
    return module


@pytest.mark.parametrize("mode", ["_StatAccumulator", "_DetailAccumulator"])
def test_what_the_released_recorder_dumps(mode, released_recorder, tmp_path):
    """Six passes of two ranks: `stat` dumps them from a buffer of eight, after adding ranks up; `detail` per rank."""
    rng = np.random.default_rng(3)
    placement = np.concatenate([rng.permuted(np.tile(np.arange(12), (5, 1)), axis=1), rng.integers(0, 12, (5, 4))], 1)
    counts = rng.integers(0, 1000, (2, 6, 5, 16))
    expected = np.zeros((6, 5, 12), int)
    for _, number, layer, slot in np.ndindex(counts.shape):
        expected[number, layer, placement[layer, slot]] += counts[_, number, layer, slot]
    model = SimpleNamespace(
        num_layers=5, num_physical_experts=16, num_logical_experts=12, physical_to_logical_map=tensor(placement)
    )
    summed = mode == "_StatAccumulator"
    for rank, of_rank in enumerate([counts.sum(axis=0)] if summed else counts):
        accumulator = getattr(released_recorder, mode)(model, rank)
        for number, count in enumerate(of_rank):
            accumulator.append(number, "primary", {"global_physical_count": tensor(count).int()}, {})
        accumulator.dump("file")
    folder = tmp_path / "recordings"
    trace = read_trace(next(folder.glob("*.pt")) if summed else folder)
    np.testing.assert_array_equal(trace.load, expected)
    assert trace.metadata.get("unused_windows") == (2 if summed else None)


def test_what_sglang_starts_from(tmp_path):
    path = tmp_path / "init.json"
    write_placement(path, np.asarray(MAP))
    assert json.loads(path.read_text()) == {"physical_to_logical_map": MAP}  # SGLang passes every key on
    write_trace(path, [[[1, 2]]], {"layer_ids": [2]}, format="sglang")
    assert json.loads(path.read_text()) == {"logical_count": [[[0, 0], [0, 0], [1, 2]]]}


def test_what_sglang_starts_from_as_torch_file(tmp_path):
    torch = pytest.importorskip("torch")
    write_placement(tmp_path / "init.pt", np.asarray(MAP))
    found = torch.load(tmp_path / "init.pt", weights_only=True)
    assert list(found) == ["physical_to_logical_map"]
    assert found["physical_to_logical_map"].tolist() == MAP
    write_trace(tmp_path / "count.pt", [[[1, 2]]], {"layer_ids": [2]})
    found = torch.load(tmp_path / "count.pt", weights_only=True)
    assert found["logical_count"].tolist() == [[[0, 0], [0, 0], [1, 2]]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"records": []}, "last_physical_to_logical_map"),
        ({"records": [], "last_physical_to_logical_map": [[0]]}, "plain tensors"),
        ({"weights": 1}, "must be a recording"),
        ([1], "must hold a dict"),
    ],
)
def test_other_files_of_torch_are_not_recordings(value, message, tmp_path):
    with pytest.raises(EplbError, match=message):
        read_trace(save(tmp_path / "x.pt", value))


def test_records_that_do_not_fit_are_refused(tmp_path):
    good = record(0, 0, np.ones((2, 6), int))
    for records, message in (
        ([good, good], "one record per pass and rank"),
        ([good, record(1, 0, [[1, 2]])], "one record per pass and rank"),
        ([good | {"rank": "0"}], "forward_pass_id, rank"),
        ([{**good, "global_physical_count": 3}], "plain tensors"),
        ([], "must have records"),
        ([3], "forward_pass_id, rank"),
    ):
        path = save(tmp_path / "x.pt", {"records": records, "last_physical_to_logical_map": tensor(MAP)})
        with pytest.raises(EplbError, match=message):
            read_trace(path)


def test_recordings_of_different_models_are_not_added(tmp_path):
    for rank, placement in enumerate(([[0, 1]], [[0, 0]])):
        value = {"records": [record(0, rank, [[1, 1]])], "last_physical_to_logical_map": tensor(placement)}
        save(tmp_path / f"{rank}.pt", value)
    with pytest.raises(EplbError, match="a folder of their own"):
        read_trace(tmp_path)


def test_a_folder_needs_recordings(tmp_path):
    with pytest.raises(EplbError, match=r"must have \.pt files"):
        read_trace(tmp_path)


# sglang-jax


def test_what_sglang_jax_starts_from(tmp_path):
    write_placement(tmp_path / "init.npy", np.asarray(MAP))
    assert np.load(tmp_path / "init.npy", allow_pickle=True).tolist() == MAP
    np.save(tmp_path / "pickled.npy", np.asarray({"physical_to_logical_map": MAP}, dtype=object), allow_pickle=True)
    with pytest.raises(EplbError, match="an array of object"):
        read_placement(tmp_path / "pickled.npy")


# TensorRT-LLM


def test_a_balancer_configuration_of_tensorrt_llm(tmp_path):
    yaml = pytest.importorskip("yaml")
    same = [3, 2, 1, 0]
    config = {
        "num_slots": 4,
        "initial_global_assignments": {4: same, 3: [0, 1, 2, 3], 10: same},
        "layer_updates_per_iter": 0,
    }
    path = tmp_path / "moe_load_balancer.yaml"
    for value in (config, {"moe_config": {"backend": "WIDEEP", "load_balancer": config}}):
        for style in (None, True):
            path.write_text(yaml.dump(value, default_flow_style=style, sort_keys=False))
            assert "*id001" in path.read_text()  # PyYAML repeats a list by its name
            ids, info = read_placement(path)
            assert ids.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0]]
            assert info == {"format": "tensorrt-llm", "layer_ids": [3, 4, 10]}


def test_what_tensorrt_llm_starts_from(tmp_path):
    yaml = pytest.importorskip("yaml")
    write_placement(tmp_path / "x.yaml", np.asarray(MAP), layer_ids=[3, 4])
    found = yaml.safe_load((tmp_path / "x.yaml").read_text())
    assert found == {
        "num_slots": 6,
        "initial_global_assignments": dict(zip((3, 4), MAP, strict=True)),
        "layer_updates_per_iter": 0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("moe_config: {load_balancer: balancer.yaml}", "in a file of its own"),
        ("num_slots: 4", "initial_global_assignments"),
        ("initial_global_assignments: {0: [0, 1]}", "num_slots=None, listed=2"),
        ("num_slots: 3\ninitial_global_assignments: {0: [0, 1]}", "num_slots=3, listed=2"),
        ("num_slots: 2\ninitial_global_assignments: {x: [0, 1]}", "number its layers"),
        ("num_slots: 2\ninitial_global_assignments: {0: [0, 1], 1: [0]}", "lengths"),
        ("num_slots: 2\ninitial_global_assignments: {0: [0, true]}", "lists of expert ids"),
        ("num_slots: 2\ninitial_global_assignments: {0: 3}", "lists of together"),
        ("a: !!python/object/apply:os.system ['touch hacked']", "cannot be read"),
        ("{a: 1, <<: {b: 2}}", "a merged mapping"),
        ("a: &a [*a]\ninitial_global_assignments: {0: *a}\nnum_slots: 1", "lists of expert ids"),
        ("[" * 1000, "deep"),
        ("{" + ", ".join(f"{i}: 0" for i in range(5000)) + "}", "more than 4096 keys"),
        ("a: " + "1:" * 5000 + "1", "very long value"),
    ],
)
def test_yaml_that_is_no_balancer_configuration(content, message, tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(EplbError, match=message):
        read_placement("x.yaml")
    assert not (tmp_path / "hacked").exists()


def test_lists_that_unfold_by_their_names_are_refused(tmp_path):
    """Each line repeats the one above it a hundred times."""
    pytest.importorskip("yaml")
    lines = ["a0: &a0 [0, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 100)}]" for i in range(1, 6)]
    rows = ", ".join(f"{layer}: *big" for layer in range(4000))
    big = f"big: &big [{', '.join(['1'] * 5000)}]"
    for tail in ("{0: *a5}", "{0: *a1}", f"{{{rows}}}"):
        (tmp_path / "x.yaml").write_text(
            "\n".join([*lines, big, f"initial_global_assignments: {tail}", "num_slots: 100"])
        )
        with pytest.raises(EplbError, match="lists of"):
            read_placement(tmp_path / "x.yaml")


# vllm-ascend


def test_an_expert_map_of_vllm_ascend(tmp_path):
    devices = [
        [{"device_id": rank, "device_expert": MAP[layer][3 * rank : 3 * rank + 3]} for rank in (0, 1)]
        for layer in (0, 1)
    ]
    layers = [{"layer_id": i, "device_count": 2, "device_list": row} for i, row in enumerate(devices)]
    expected = {"moe_layer_count": 2, "layer_list": layers}
    path = tmp_path / "expert_map.json"
    path.write_text(json.dumps(expected, indent=4))
    ids, info = read_placement(path)
    assert ids.tolist() == MAP
    assert info == {"format": "vllm-ascend", "ep_size": 2}
    write_placement(path, ids, Topology(2, 3), format="vllm-ascend")
    assert json.loads(path.read_text()) == expected


def test_an_expert_map_may_say_little_and_number_layers_as_it_likes(tmp_path):
    layers = [
        {"layer_id": 4, "device_list": [{"device_expert": [0]}]},
        {"layer_id": 3, "device_list": [{"device_expert": [1]}]},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"layer_list": layers}))
    ids, info = read_placement(tmp_path / "x.json")
    assert ids.tolist() == [[0], [1]]
    assert info == {"format": "vllm-ascend", "ep_size": 1, "layer_ids": [4, 3]}


def test_expert_maps_that_contradict_themselves_are_refused(tmp_path):
    def devices(*ids):
        return [{"device_id": number, "device_expert": [number]} for number in ids]

    many = [{"device_expert": list(range(9000))}, *[{"device_expert": []}] * 9000]
    for value, message in (
        ({"moe_layer_count": 2, "layer_list": [{"device_list": devices(0)}]}, "as it states"),
        ({"layer_list": [{"device_count": 3, "device_list": devices(0, 1)}]}, "as it states"),
        ({"layer_list": [{"device_list": devices(0)}, {"device_list": devices(0, 1)}]}, "as it states"),
        ({"layer_list": [{"device_list": devices(1, 0)}]}, "order of device_id"),
        ({"layer_list": [{"device_list": devices(0), "layer_id": 1}] * 2}, "number its layers"),
        ({"layer_list": []}, "layer_list"),
        ({"layer_list": [{"device_list": [3]}]}, "device_list"),
        ({"layer_list": [{"device_list": [{"device_expert": [0.5]}]}]}, "expert ids"),
        ({"layer_list": [{"device_list": [{"device_expert": 5}]}]}, "cannot be read"),
        ({"layer_list": [{"device_list": many}]}, "at most 67108864 slots"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(value))
        with pytest.raises(EplbError, match=message):
            read_placement(tmp_path / "x.json")


# Tables and arrays


def test_tables(tmp_path):
    path = tmp_path / "load.csv"
    for content, expected, metadata in (
        ("window,layer,expert,count\n0,0,0,5\n0,0,1,6\n1,0,1,7\n", [[[5, 6]], [[0, 7]]], {}),
        ("window,layer,expert,count\n9,0,0,7\n5,0,0,6", [[[6]], [[7]]], {}),
        ("layer,expert,count\n3,0,5\n4,2,6", [[[5, 0, 0], [0, 0, 6]]], {"layer_ids": [3, 4]}),
        ('\ufeff"Count", "Expert","LAYER"\r\n4.0,0,0\r\n\r\n', [[[4]]], {}),
        ("1,2,3\n4,5,6\n", [[[1, 2, 3], [4, 5, 6]]], {}),
        ("\ufeff1.004,299\n", [[[1, 299]]], {}),
        ("7", [[[7]]], {}),
    ):
        path.write_bytes(content.encode())
        trace = read_trace(path)
        assert (trace.load.tolist(), trace.metadata) == (expected, metadata)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no numbers"),
        ("window,layer,expert,count\n", "no numbers"),
        ("window,layer,expert\n0,0,0\n", "must have the columns"),
        ("layer,layer,expert,count\n0,0,0,0\n", "must have the columns"),
        ("layer,expert,count\n0,0,1\n0,0,2\n", r"1 repeated, first \[\(0, 0, 0\)\]"),
        ("layer,expert,count\n0,-1,1\n", "number windows, layers and experts from 0"),
        ("layer,expert,count\n0,2000000,1\n", "experts below"),
        ("layer,expert,count\n0,0,-1\n", "negative counts"),
        ("layer,expert,count\n0,0,nan\n", "NaN"),
        ("layer,expert,count\n0,0.5,1\n", "could not convert"),
        ("layer,expert,count\n0,0\n", "columns"),
        ("layer,expert,count\n99999999999,0,1\n", "number its layers"),
        ("1,2\n3\n", "columns changed"),
        ("a,b\n1,2\n", "could not convert"),
        ("1,2\n3,x\n", "could not convert"),
    ],
)
def test_tables_that_are_no_loads(content, message, tmp_path):
    (tmp_path / "load.csv").write_text(content)
    with pytest.raises(EplbError, match=message):
        read_trace(tmp_path / "load.csv")


def test_a_few_rows_of_a_table_cannot_ask_for_terabytes(tmp_path):
    rows = "".join(f"{window},{window},1000000,1\n" for window in range(1000))
    (tmp_path / "load.csv").write_text("window,layer,expert,count\n" + rows)
    with pytest.raises(EplbError, match="unpack to at most 1073741824 bytes"):
        read_trace(tmp_path / "load.csv")


def test_an_npz_of_others_may_have_labels_beside_its_load(tmp_path):
    arrays = {"labels": np.asarray(["a", "b"]), "layer_ids": np.asarray([1]), "ids": np.zeros((2, 2))}
    np.savez(tmp_path / "x.npz", load=np.ones((2, 1, 3)), meta=json.dumps({"model": "m"}), **arrays)
    trace = read_trace(tmp_path / "x.npz")
    assert trace.load.tolist() == [[[1] * 3]] * 2
    assert trace.metadata == {"model": "m", "labels": ["a", "b"], "layer_ids": [1]}


def test_fractions_are_rounded_half_to_even_up_to_one_percent_of_a_window(tmp_path):
    path = tmp_path / "x.npy"
    for load, rounded in (([0.5, 1.5, 2.5, 300.0], [0, 2, 2, 300]), ([0.75, 27.0], [1, 27]), ([0.0], [0])):
        np.save(path, np.asarray([load]))
        assert read_trace(path).load.tolist() == [[rounded]]
    np.save(path, np.asarray([[[9000.0, 1.0]], [[0.75, 16.0]]]))
    with pytest.raises(EplbError, match=r"more than 1% at 1 positions, first at \[\(1,\)\]"):
        read_trace(path)


def test_tokens_of_a_layer_stay_below_2_to_63(tmp_path):
    for load in ([[[2**62, 2**62]]], [[[2**62]], [[2**62]]]):
        np.save(tmp_path / "x.npy", np.asarray(load))
        with pytest.raises(EplbError, match=r"fewer than 2\*\*63 tokens per layer"):
            read_trace(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.asarray([[2**62], [2**62]]))  # two layers
    assert read_trace(tmp_path / "x.npy").load.tolist() == [[[2**62], [2**62]]]


@pytest.mark.parametrize("name", ["esft_dsv2lite_w1024", "esft_dsv2lite_w4096", "gptoss20b_by_subject_ge8192tok"])
def test_recorded_traces(name):
    expected = traces.recorded(name)
    if expected is None:
        pytest.skip(f"{name}.npz is not in {traces.FOLDER} (EPLB_TRACES)")
    path = traces.FOLDER / f"{name}.npz"
    load, metadata = read_trace(path)
    np.testing.assert_array_equal(load, expected)
    np.testing.assert_array_equal(np.stack(list(iter_windows(path))), expected)
    assert len(metadata["labels"]) == len(load)
    assert "model" in metadata


def test_column_major_arrays_are_read_whole_only(tmp_path):
    load = np.asfortranarray(np.arange(12).reshape(2, 3, 2))
    np.save(tmp_path / "x.npy", load)
    np.testing.assert_array_equal(read_trace(tmp_path / "x.npy").load, load)
    with pytest.raises(EplbError, match="read it whole"):
        list(iter_windows(tmp_path / "x.npy"))


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_large_arrays_are_streamed_in_little_memory(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    load = np.broadcast_to(np.arange(2**15).reshape(32, 1024), (64, 32, 1024))  # 16 MiB
    np.savez_compressed(path, load=load) if suffix == "npz" else np.save(path, load)
    with pytest.raises(EplbError, match="at most"):
        read_trace(path, limit_bytes=2**20)
    tracemalloc.start()
    count = sum(int(window[31, 1023] == 2**15 - 1) for window in iter_windows(path, limit_bytes=2**20))
    copy = tmp_path / "copy.npz"
    write_trace(copy, iter_windows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 64
    assert peak < 2**22
    assert sum(1 for _ in iter_windows(copy)) == 64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_checksums_are_compared(save, tmp_path):
    """A bit of a count is flipped where the archive stores it; packed, the damage is wherever it is."""
    save(tmp_path / "x.npz", load=np.arange(3000).reshape(10, 3, 100) * 7919 % 10007)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    for reader in (read_trace, lambda path: list(iter_windows(path))):
        with pytest.raises(EplbError, match="cannot be read"):
            reader(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("width", [1, 100, 4096])
def test_a_wrong_checksum_of_right_data_is_noticed(save, width, tmp_path):
    save(tmp_path / "x.npz", load=np.arange(3 * width).reshape(3, 1, width))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 16] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    for reader in (read_trace, lambda path: list(iter_windows(path))):
        with pytest.raises(EplbError, match="Bad CRC"):
            reader(tmp_path / "x.npz")


def test_metadata_of_a_large_trace_is_read_alone_and_within_its_limit(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, load=np.ones((99, 10, 100)), labels=np.asarray(["a"]), meta=json.dumps({"labels": ["b"], "n": 1}))
    assert read_metadata(path, limit_bytes=2**12) == {"labels": ["b"], "n": 1}
    np.savez(path, load=np.ones((1, 1, 1)), labels=np.asarray(["a" * 2000]))
    with pytest.raises(EplbError, match="metadata of at most 4096 bytes"):
        read_metadata(path, limit_bytes=2**12)


def test_a_snapshot_is_a_placement_and_no_trace(tmp_path):
    np.savez(tmp_path / "x.npz", load=np.ones((1, 4)), physical_to_logical=np.arange(4)[None])
    assert read_placement(tmp_path / "x.npz").physical_to_logical.tolist() == [[0, 1, 2, 3]]
    for reader in (read_trace, lambda path: list(iter_windows(path))):
        with pytest.raises(EplbError, match="A placement is not a trace"):
            reader(tmp_path / "x.npz")


def test_placements_that_a_format_cannot_express_are_refused(tmp_path):
    for name, format, ids, options, message in (
        ("x.json", "vllm-ascend", [[0, 1]], {}, "must get the topology"),
        ("x.npz", None, [[0, 1]], {}, "must get the topology"),
        ("x.npz", None, [[0, 1]], {"topology": Topology(3, 1)}, "as many slots as the placement"),
        ("x.json", None, [[0, -1]], {}, "an expert for every slot"),
        ("x.yaml", None, [[0, -1]], {}, "an expert for every slot"),
        ("x.pt", None, [[0, -1]], {}, "an expert for every slot"),
        ("x.json", "vllm-ascend", [[0, -1]], {"topology": Topology(2, 1)}, "an expert for every slot"),
        ("x.yaml", None, [[0, 1]], {"layer_ids": [0, 1]}, "number each layer"),
        ("x.json", None, [[0, 1]], {"layer_ids": [10_000]}, "number each layer"),
        ("x.csv", None, [[0, 1]], {}, "must be one of"),
        ("x.txt", None, [[0, 1]], {}, "the file's ending does not tell it"),
        ("x.npy", None, [[0.5, 1]], {}, "expert ids"),
    ):
        with pytest.raises(EplbError, match=message):
            write_placement(tmp_path / name, np.asarray(ids), format=format, **options)
        assert not list(tmp_path.iterdir())


def test_traces_that_cannot_be_written_leave_nothing_behind(tmp_path):
    for load, metadata, message in (
        ([[[1]], [[1, 2]]], None, "cannot be read|same shape"),
        (iter([[[1]], [[1, 2]]]), None, "windows `.layers, experts.` of one shape"),
        (iter([]), None, "at least one window"),
        (iter([[1, 2]]), None, "must hold a load"),
        ([[1]], {"x": float("nan")}, "dict of JSON values"),
        ([[1]], {"x": (1, 2)}, "dict of JSON values"),
        ([[1]], {1: 2}, "dict of JSON values"),
        ([[1]], {"layer_ids": [1, 2]}, "number each layer"),
        ([[1]], {"layer_ids": "1"}, "number each layer"),
        ([[-1]], None, "negative"),
    ):
        with pytest.raises(EplbError, match=message):
            write_trace(tmp_path / "x.npz", load, metadata)
        assert not list(tmp_path.iterdir())


def test_a_move_plan_must_have_the_form_of_one(tmp_path):
    ids, meta = np.asarray([[0, 1]]), json.dumps({"ep_size": 2, "slots_per_rank": 1, "num_nodes": 1})
    good = {"old": ids, "new": ids, "source_slot": ids, "meta": meta}
    for change, message in (
        ({"meta": "{}"}, "ep_size"),
        ({"meta": json.dumps({"ep_size": 3, "slots_per_rank": 1, "num_nodes": 1})}, r"arrays \[layers, 3\]"),
        ({"new": ids[:, :1]}, r"arrays \[layers, 2\]"),
        ({"relay_slot": ids[:, :1]}, r"arrays \[layers, 2\]"),
        ({"source_slot": ids * 0.5}, "expert ids"),
        ({"schedule": np.zeros((6, 1), np.int32)}, "7 columns"),
        ({"schedule": np.zeros((7, 1))}, "7 columns"),
    ):
        np.savez(tmp_path / "x.npz", **(good | change))
        with pytest.raises(EplbError, match=message):
            read_plan(tmp_path / "x.npz")


def test_nested_lists(tmp_path):
    path = tmp_path / "x.json"
    for content, expected in (("[[1, 2]]", [[[1, 2]]]), ('{"load": [[[1]], [[2.0]]]}', [[[1]], [[2]]])):
        path.write_text(content)
        assert read_trace(path).load.tolist() == expected
    path.write_text("[[0, 1, -1]]")
    assert read_placement(path).physical_to_logical.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2], [3]]", r"lengths \[1, 2\] at depth 2"),
        ("[[1, true]]", "bool and int"),
        ("[[1, null]]", "NoneType"),
        ('[["1"]]', "str"),
        ("[1, 2]", r"shape \(2,\)"),
        ("[[[[1]]]]", "two or three deep"),
        ("[]", "shape"),
        ("[[]]", "empty axes"),
        ("[[NaN]]", "NaN, which JSON does not have"),
        ("[[1e999]]", "NaN or infinity"),
        ("[[-1]]", r"first at \[\(0, 0, 0\)\]"),
        ("[[9223372036854775808]]", r"2\*\*63"),
        ("[[99999999999999999999999]]", "64 bits"),
        ("[[9223372036854775807], [1]]", r"2\*\*63"),
        ("[[0.5]]", "more than 1%"),
        ("[" * 100_000, "cannot be read"),
        ("[[" + "9" * 5000 + "]]", "cannot be read"),
        ('{"load": [[1]], "metadata": 3}', "dict of JSON values"),
        ('{"layer_list": []}', "A placement is not a trace"),
        ("3", "must be nested lists"),
        ("\xff", "cannot be read"),
    ],
)
def test_json_that_is_no_load(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(EplbError, match=message):
        read_trace(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"logical_count": [[[1]]]}', "eplb plan"),
        ('{"load": [[[1]]]}', "eplb plan"),
        ("[[0.0]]", "expert ids"),
        ("[[-2]]", "other ids"),
        ("[[1048576]]", "other ids"),
        ("[[[0]]]", "expert ids"),
        ("[0]", "expert ids"),
        ('{"physical_to_logical_map": null}', "numbers"),
        ('{"a": 1}', "layer_list"),
    ],
)
def test_json_that_is_no_placement(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(EplbError, match=message):
        read_placement(tmp_path / "x.json")


# Harm


class Harm:
    def __reduce__(self):
        return (open, ("hacked", "w"))


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt"])
def test_pickles_do_not_run(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if suffix == "pt":
        save("x.pt", {"logical_count": Harm()})
    else:
        saved = np.asarray([Harm()], dtype=object)
        np.savez("x.npz", load=saved) if suffix == "npz" else np.save("x.npy", saved, allow_pickle=True)
    for reader in (read_trace, read_placement, lambda path: list(iter_windows(path))):
        with pytest.raises(EplbError):
            reader(f"x.{suffix}")
    (tmp_path / f"x.{suffix}").write_bytes(pickle.dumps({"logical_count": Harm()}))
    with pytest.raises(EplbError, match="cannot be read"):
        read_trace(f"x.{suffix}")
    assert not (tmp_path / "hacked").exists()


def test_pickles_do_not_run_even_if_what_they_call_were_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("x.pt", {"logical_count": Harm()})
    monkeypatch.setattr("eplb_core.formats.sglang_pt._KNOWN", re.compile(".*"))
    with pytest.raises(EplbError, match="torch does not load with weights_only"):
        read_trace("x.pt")
    assert not (tmp_path / "hacked").exists()


def repacked(path, change, compression=zipfile.ZIP_STORED):
    """Replace the pickle of a torch file."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


def test_torch_files_may_not_call_what_allocates(tmp_path):
    """`weights_only` would run this, and fill 64 GiB with zeros."""
    pytest.importorskip("torch")
    call = b"\x80\x02}X\x0d\x00\x00\x00logical_countc__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85Rs."
    path = repacked(save(tmp_path / "x.pt", {}), lambda _: call)
    with pytest.raises(EplbError, match="a pickle that calls __builtin__ bytearray"):
        read_trace(path)


def test_torch_files_may_not_claim_more_than_they_hold(tmp_path):
    torch = pytest.importorskip("torch")
    path = save(tmp_path / "x.pt", {"logical_count": torch.ones(1, 1, 24, dtype=torch.int32)})
    with pytest.raises(EplbError, match="weights_only"):
        read_trace(repacked(path, lambda pickled: pickled.replace(b"K\x18tq", b"J\x00\x00\x00\x40tq")))
    save(path, {"logical_count": torch.ones(1).expand(2**20, 2**20, 2**10)})
    with pytest.raises(EplbError, match="plain tensors of at most"):
        read_trace(path)
    save(path, {"logical_count": torch.ones(2, 2).to_sparse()})
    with pytest.raises(EplbError, match="a pickle that calls"):
        read_trace(path)


def test_torch_files_are_stored_and_whole(tmp_path):
    torch = pytest.importorskip("torch")
    value = {"logical_count": torch.zeros(1, 2**10, 2**10, dtype=torch.int64)}
    path = repacked(save(tmp_path / "x.pt", value), lambda same: same, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**15
    with pytest.raises(EplbError, match=r"torch\.save does not write"):
        read_trace(path)
    save(path, value)
    with pytest.raises(EplbError, match="at most 1048576 bytes"):
        read_trace(path, limit_bytes=2**20)
    content = bytearray(path.read_bytes())
    content[2**20] ^= 1
    path.write_bytes(content)
    with pytest.raises(EplbError, match="checksum"):
        read_trace(path)


def test_a_missing_torch_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "x.pt", {"physical_to_logical_map": tensor(MAP)})
    monkeypatch.setitem(sys.modules, "torch", None)
    for use in (lambda: read_placement(path), lambda: write_trace(path, [[[1]]])):
        with pytest.raises(EplbError, match=r"pip install 'eplb\[torch\]'"):
            use()


def test_a_missing_yaml_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("num_slots: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(EplbError, match=r"pip install 'eplb\[cli\]'"):
        read_placement(tmp_path / "x.yaml")


@pytest.mark.parametrize("suffix", ["npz", "npy", "json", "csv", "pt", "yaml"])
def test_what_is_no_file_is_refused(suffix, tmp_path):
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("missing", "folder"):
        for reader in (read_trace, read_placement):
            with pytest.raises(EplbError):
                reader(tmp_path / f"{name}.{suffix}")


def test_large_files_are_refused_before_they_are_read(tmp_path):
    for suffix in ("npz", "npy", "json", "csv", "pt", "yaml"):
        path = tmp_path / f"x.{suffix}"
        with open(path, "wb") as file:
            file.truncate(2**40)
        for reader in (read_trace, read_placement):
            with pytest.raises(EplbError):
                reader(path)


@pytest.mark.parametrize(("name", "share"), [("x.json", 32), ("x.csv", 16), ("x.yaml", 1024)])
def test_text_may_have_a_fraction_of_the_limit(name, share, tmp_path):
    pytest.importorskip("yaml")
    content = "num_slots: 1\ninitial_global_assignments: {0: [0]}" if name == "x.yaml" else "1"
    content = "[[1]]" if name == "x.json" else content
    (tmp_path / name).write_text(content.ljust(64))
    reader = read_placement if name == "x.yaml" else read_trace
    reader(tmp_path / name, limit_bytes=64 * share)
    with pytest.raises(EplbError, match="at most 63 bytes; got 64 bytes"):
        reader(tmp_path / name, limit_bytes=64 * share - 1)


def test_a_small_archive_may_not_unfold_into_a_large_one(tmp_path):
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1, 9437184)}\n"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("load.npy", "w") as member:
        member.write(header)
        for _ in range(72):
            member.write(bytes(2**20))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    assert len(buffer.getvalue()) < 2**17
    for reader in (read_trace, lambda *a, **k: list(iter_windows(*a, **k))):
        with pytest.raises(EplbError, match="at most 1048576 bytes"):
            reader(tmp_path / "x.npz", limit_bytes=2**20)
