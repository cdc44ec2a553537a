"""Reading single experts' tensors from safetensors checkpoints."""

import json
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from eplb_core import EplbError, Topology
from eplb_core.checkpoint import CheckpointRows
from eplb_core.elastic import lose_ranks

save_file = pytest.importorskip("safetensors.numpy").save_file


def key(layer, name, expert):
    return f"layers.{layer}.experts.{expert}.{name}"


def tensor(layer, name, expert):
    """Different for every expert and name."""
    return np.arange(6, dtype=np.float32).reshape(2, 3) + 100 * expert + 1000 * layer + 10 * len(name)


def shard(experts):
    return {key(layer, name, e): tensor(layer, name, e) for layer in (0, 1) for e in experts for name in ("up", "down")}


@pytest.fixture
def folder(tmp_path):
    """Two shards with an index, four experts in two layers."""
    shards = {"model-1.safetensors": shard([0, 1]), "model-2.safetensors": shard([2, 3])}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    index = {"metadata": {}, "weight_map": {k: name for name, tensors in shards.items() for k in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def all_match(rows):
    pairs = [(layer, name, e) for layer in (0, 1) for e in range(4) for name in ("up", "down")]
    return all(np.array_equal(rows(*pair), tensor(*pair)) for pair in pairs)


def test_every_way_to_name_a_checkpoint(folder, tmp_path):
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        with CheckpointRows(path, key) as rows:
            assert all_match(rows)
    (folder / "model.safetensors.index.json").unlink()
    with CheckpointRows(folder, key) as rows:
        assert all_match(rows)
    with CheckpointRows(folder / "model-2.safetensors", key) as rows:
        assert rows(1, "up", 3).tolist() == tensor(1, "up", 3).tolist()
        with pytest.raises(EplbError, match=r"none of its 8 keys\. Near the first: \['layers.0.experts"):
            rows(0, "up", 0)


def test_what_a_loss_needs_is_there_or_named_before_it_begins(folder):
    held = np.tile(np.asarray([0, 1, 2, 0, 3, 1]), (2, 1))
    plan = lose_ranks(held, np.ones((2, 4), dtype=int), Topology(3, 2), [1, 2], slots_per_rank=4)
    assert plan.reload == ((0, 2), (0, 3), (1, 2), (1, 3))
    with CheckpointRows(folder, key) as rows:
        rows.check(plan.reload, ["up", "down"])
        for layer, _, expert in plan.reload_slots().tolist():
            assert rows(layer, "up", expert).tolist() == tensor(layer, "up", expert).tolist()
        missing = "'layers.0.experts.2.scale', 'layers.0.experts.3.scale', 'layers.1.experts.2.scale', 'layers"
        with pytest.raises(EplbError, match=missing):
            rows.check(plan.reload, ["up", "scale"])
        with pytest.raises(EplbError, match="layers.2.experts.0.up"):
            rows.check([(0, 0), (2, 0)], ["up"])
    (folder / "model-2.safetensors").unlink()
    with CheckpointRows(folder, key) as rows:
        rows.check([(0, 0)], ["up"])
        with pytest.raises(EplbError, match=r"missing \[model-2.safetensors\]"):
            rows.check(plan.reload, ["up"])
        with pytest.raises(EplbError, match="must be a file"):
            rows(0, "up", 2)


def test_rows_of_a_tensor_that_holds_all_experts(tmp_path):
    fused = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    save_file({"experts.up": fused, "scale": np.asarray(2.0, dtype=np.float32)}, tmp_path / "model.safetensors")
    with CheckpointRows(tmp_path, lambda layer, name, expert: (f"experts.{name}", expert)) as rows:
        for expert in range(4):
            assert rows(0, "up", expert).tolist() == fused[expert].tolist()
        for outside in (4, -1):
            with pytest.raises(EplbError, match=rf"row {outside} of 'experts.up' with shape \(4, 2, 3\)"):
                rows(0, "up", outside)
    with (
        CheckpointRows(tmp_path, lambda layer, name, expert: ("scale", 0)) as rows,
        pytest.raises(EplbError, match="row 0"),
    ):
        rows(0, "scale", 0)
    with CheckpointRows(tmp_path, lambda layer, name, expert: "scale") as rows:
        assert rows(0, "scale", 0) == 2.0


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_one_row_does_not_load_the_file(tmp_path, framework):
    """A gigabyte on disk (sparse), 64 KiB asked for."""
    if framework == "torch":
        pytest.importorskip("torch")
    shape = [256, 1024, 1024]
    size = 4 * int(np.prod(shape))
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + size)
    tracemalloc.start()
    with CheckpointRows(file, lambda layer, name, expert: ("w", expert), framework=framework) as rows:
        assert tuple(rows(0, "w", 7).shape) == (1024, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_dtypes_that_numpy_lacks_come_as_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    values = torch.arange(6).reshape(2, 3)
    tensors = {"b": values.bfloat16(), "f": values.to(torch.float8_e4m3fn), "u": values.to(torch.uint8)}
    save_tensors(tensors, tmp_path / "model.safetensors")
    with CheckpointRows(tmp_path, lambda layer, name, expert: (name, expert), framework="torch") as rows:
        for name, expected in tensors.items():
            assert rows(0, name, 1).dtype == expected.dtype
            assert rows(0, name, 1).float().tolist() == expected[1].float().tolist()
    with CheckpointRows(tmp_path, lambda layer, name, expert: name) as rows:
        assert rows(0, "u", 0).tolist() == values.tolist()
        for name, dtype in (("b", "BF16"), ("f", "F8_E4M3")):
            with pytest.raises(EplbError, match=f"dtype {dtype}.*framework='torch'"):
                rows(0, name, 0)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..\\secret.safetensors"]
)
def test_an_index_cannot_point_outside_its_folder(folder, name):
    save_file({"k": np.zeros(1)}, folder.parent / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"k": name}}))
    with pytest.raises(EplbError, match="own folder"):
        CheckpointRows(folder, key)


def test_files_below_the_index_will_do(folder):
    (folder / "shards").mkdir()
    (folder / "model-1.safetensors").rename(folder / "shards" / "one.safetensors")
    index = {"weight_map": {k: "shards/one.safetensors" for k in shard([0, 1])}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with CheckpointRows(folder, key) as rows:
        assert rows(1, "down", 1).tolist() == tensor(1, "down", 1).tolist()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"k": 3}}', b"\xff"]
)
def test_a_broken_index(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(EplbError, match="index.json.*(must be JSON|cannot be read)"):
        CheckpointRows(folder, key)


def test_paths_that_lead_nowhere(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for path, complaint in (
        (empty, "0 indices and 0 files"),
        (folder / "none", "must be a folder"),
        (folder / "no.bin", "a"),
    ):
        with pytest.raises(EplbError, match=complaint):
            CheckpointRows(path, key)
    (folder / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(EplbError, match="2 indices"):
        CheckpointRows(folder, key)
    (empty / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(EplbError, match="cannot be read as safetensors"):
        CheckpointRows(empty, key)
    with pytest.raises(EplbError, match="framework='tf'"):
        CheckpointRows(folder, key, framework="tf")


def test_closed_files_are_opened_again(folder):
    rows = CheckpointRows(folder, key)
    for _ in range(2):
        assert rows(0, "up", 0).tolist() == tensor(0, "up", 0).tolist()
        rows.close()


def test_reading_as_numpy_imports_no_torch(folder):
    code = (
        "import sys; from eplb_core.checkpoint import CheckpointRows; assert 'safetensors' not in sys.modules;"
        f"CheckpointRows({str(folder)!r}, lambda *_: 'layers.0.experts.0.up')(0, 'up', 0);"
        "sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
