"""Hostile files: whatever is read is refused by `EplbError` with the file's name, soon and in little memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_core import EplbError, MovePlan, Topology, round_robin
from eplb_core.checkpoint import CheckpointRows
from eplb_core.snapshot import Snapshot, load_snapshot, save_snapshot
from eplb_core.trace import (
    iter_windows,
    read_metadata,
    read_placement,
    read_plan,
    read_trace,
    write_placement,
    write_plan,
    write_trace,
)

TOPOLOGY = Topology(2, 2)
PLACED = round_robin(1, 3, TOPOLOGY)
LOAD = np.arange(12).reshape(2, 2, 3)


def windows(path, **options):
    return list(iter_windows(path, **options))


def rows(path):
    with CheckpointRows(path, lambda layer, name, expert: name) as found:
        return found(0, "up", 0)


# What reads, the endings that it knows, and what writes a good file.
READERS = {
    "read_trace": (read_trace, (".npz", ".npy", ".json", ".csv", ".pt"), lambda path: write_trace(path, LOAD)),
    "read_metadata": (read_metadata, (".npz", ".json", ".csv"), lambda path: write_trace(path, LOAD)),
    "iter_windows": (windows, (".npz", ".npy", ".json", ".csv", ".pt"), lambda path: write_trace(path, LOAD)),
    "read_placement": (
        read_placement,
        (".npz", ".npy", ".json", ".pt", ".yaml"),
        lambda path: write_placement(path, PLACED, TOPOLOGY),
    ),
    "read_plan": (read_plan, (".npz",), lambda path: write_plan(path, PLACED, PLACED, MovePlan(PLACED * 0), TOPOLOGY)),
    "load_snapshot": (
        load_snapshot,
        (".npz", ".json"),
        lambda path: save_snapshot(path, Snapshot(PLACED, TOPOLOGY, 3, load=(np.ones(3),))),
    ),
    "CheckpointRows": (rows, (".safetensors", ".safetensors.index.json"), None),
}
CASES = [(name, ending) for name, (_, endings, _) in READERS.items() for ending in endings]
each_reader = pytest.mark.parametrize(("name", "ending"), CASES, ids=["".join(case) for case in CASES])


def refuse(name: str, path: Path) -> None:
    with pytest.raises(EplbError) as caught:
        READERS[name][0](path)
    assert path.name in str(caught.value) or path.parent.name in str(caught.value)
    assert len(str(caught.value)) < 1000


@each_reader
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_does_not_hang(name, ending, tmp_path):
    for kind, make in {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "loop": lambda path: path.symlink_to(path),
        "nowhere": lambda path: path.symlink_to("missing"),
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "pipe by a link": lambda path: (
            os.mkfifo(path.with_suffix(".pipe")),
            path.symlink_to(path.with_suffix(".pipe")),
        ),
        "missing": lambda path: None,
    }.items():
        path = tmp_path / f"{kind.replace(' ', '-')}{ending}"
        make(path)
        refuse(name, path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json"])
def test_a_folder_of_pipes_does_not_hang(ending, tmp_path):
    os.mkfifo(tmp_path / f"model{ending}")
    refuse("CheckpointRows", tmp_path)


@pytest.mark.timeout(20)
def test_a_pipe_that_takes_the_place_of_a_file_after_the_check_does_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "load.npz")
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    with pytest.raises(EplbError, match="must be a file; got another kind"):
        read_trace(tmp_path / "load.npz")


@each_reader
def test_empty_files_and_noise_are_refused(name, ending, tmp_path):
    noise = np.random.default_rng(0).bytes(4096)
    for content in (b"", b"\0", b"\n", b"\0" * 4096, noise, b"\xff\xfe1\x00,\x002\x00", b"PK\x05\x06" + b"\0" * 18):
        path = tmp_path / f"content{ending}"
        path.write_bytes(content)
        refuse(name, path)


@each_reader
def test_a_file_that_ends_early_at_any_byte_is_refused_or_read(name, ending, tmp_path):
    path = tmp_path / f"whole{ending}"
    if READERS[name][2] is None:
        _write_checkpoint(path)
    else:
        READERS[name][2](path)
    content = path.read_bytes()
    READERS[name][0](path)
    step = 1 if len(content) < 400 else 7  # every byte of small files
    for size in range(0, len(content) - 1, step):
        path.write_bytes(content[:size])
        if ending == ".csv" and size > content.index(b"\n"):  # a table may end with any row
            break
        refuse(name, path)


def _write_checkpoint(path: Path) -> None:
    from safetensors.numpy import save_file

    file = path.parent / "model.safetensors"
    save_file({"up": np.arange(3.0)}, path if path.suffix == ".safetensors" else file)
    if path.suffix == ".json":
        path.write_text(json.dumps({"weight_map": {"up": file.name}}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@each_reader
def test_unreadable_files_are_refused(name, ending, tmp_path):
    path = tmp_path / f"secret{ending}"
    path.write_bytes(b"1")
    path.chmod(0)
    refuse(name, path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "path", [0, 1, True, None, b"load.npz", 3.5, ["load.npz"], object(), "a\0.npz", "", "\ud800.npz"]
)
def test_what_is_no_path_is_refused(name, path):
    """An integer would be an open file: 0 is standard input, and reading that may never end."""
    with pytest.raises(EplbError):
        READERS[name][0](path)


class Creates:
    """Unpickled by an unsafe reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_reader
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_is_unpickled(name, ending, protocol, tmp_path):
    """Bare pickles, and pickles where each format could hide one."""
    proof, path = tmp_path / "proof", tmp_path / f"bait{ending}"
    bait = pickle.dumps(Creates(proof), protocol=protocol)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bait
    saved = io.BytesIO()
    torch.save({"logical_count": torch.ones(1, 1, 1), "x": Creates(proof)}, saved, pickle_protocol=max(protocol, 2))
    for content in (
        bait,
        npy,
        saved.getvalue(),
        _zip({"load.npy": npy}),
        _zip({"meta.npy": npy, "load.npy": npy}),
        _zip({"physical_to_logical.npy": npy}),
        _zip({"archive/data.pkl": bait, "archive/version": b"3\n"}),
        bait + _zip({"archive/data.pkl": pickle.dumps({}, protocol=2)}),  # an archive that begins as a pickle
        b"!!python/object/apply:pathlib.Path.touch ['" + str(proof).encode() + b"']\n",
    ):
        path.write_bytes(content)
        if (name, ending, content) != ("read_metadata", ".npz", _zip({"load.npy": npy})):  # which looks at no load
            refuse(name, path)
        assert not proof.exists()
    pickle.loads(bait)
    assert proof.exists()  # it would have worked


def _zip(members: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def test_an_archive_of_torch_that_begins_as_its_old_format_is_refused(tmp_path):
    """The old format, which torch would read then, takes whatever room its storages claim."""
    old, good = io.BytesIO(), io.BytesIO()
    torch.save({"logical_count": torch.ones(1, 1, 2)}, old, _use_new_zipfile_serialization=False)
    torch.save({"logical_count": torch.ones(1, 1, 1)}, good)
    path = tmp_path / "load.pt"
    path.write_bytes(old.getvalue() + good.getvalue())
    assert torch.load(path, weights_only=True)["logical_count"].shape == (1, 1, 2)
    assert zipfile.is_zipfile(path)
    with pytest.raises(EplbError, match="no archive of torch.save"):
        read_trace(path)


@each_reader
@pytest.mark.timeout(60)
def test_bombs_are_refused_in_little_memory(name, ending, tmp_path):
    """What a header claims, what unpacks to far more than it is, and depths that overflow a stack."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    names = ("load.npy", "physical_to_logical.npy", "old.npy", "new.npy", "source_slot.npy", "meta.npy")
    zeros = npy + b"\0" * 2**24
    path = tmp_path / f"bomb{ending}"
    for content in (
        npy,
        _zip(dict.fromkeys(names, npy)),
        _zip(dict.fromkeys(names, zeros), compression=zipfile.ZIP_DEFLATED),
        _grown(_zip({"load.npy": zeros, "meta.npy": zeros}, compression=zipfile.ZIP_DEFLATED), len(zeros)),
        b"[" * 10**6,
        b'{"load":' * 10**5,
        b"[" * 10**5 + b"]" * 10**5,
        b'{"weight_map": ' + b"[" * 10**5,
        b"a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" * 10**4,
        b"0,1," + b"9" * 10**6,
        struct.pack("<Q", 2**62) + b"{}",
    ):
        path.write_bytes(content)
        tracemalloc.start()
        refuse(name, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**28, f"{peak} bytes"


def _grown(content: bytes, size: int) -> bytes:
    """An archive whose directory claims four gigabytes for each member."""
    begin = content.index(b"PK\x01\x02")
    return content[:begin] + content[begin:].replace(struct.pack("<I", size), struct.pack("<I", 2**32 - 2))


@pytest.mark.parametrize(
    "content",
    [
        '{"load": [[[1, 2]]], "load": [[[3, 4]]]}',
        '{"physical_to_logical_map": [[0, 1]], "physical_to_logical_map": [[1, 0]]}',
        '{"load": [[[1, 2]]], "metadata": {"a": 1, "a": 2}}',
        '{"load": [[[1, NaN]]]}',
        '{"load": [[[1, -Infinity]]]}',
        '{"load": [[[1, 1e400]]]}',
        f'{{"load": [[[1, {"9" * 30}]]]}}',
        f'{{"load": [[[1, {"9" * 5000}]]]}}',
        '{"load": [[[1, "2"]]]}',
        '{"load": [[[1, true]]]}',
        '{"load": [[[1, null]]]}',
        "[[0, 1.5]]",
        '{"snapshot": 1, "arrays": {}}',
        '{"snapshot": 1, "arrays": {"physical_to_logical": {"dtype": "O", "shape": [1], "values": [1]}}}',
    ],
    ids=range(14),
)
@pytest.mark.parametrize("reader", [read_trace, read_placement, load_snapshot])
def test_ambiguous_or_impossible_json_is_refused(content, reader, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(content)
    if reader is read_trace and content == "[[0, 1.5]]":
        pytest.skip("refused for its rounding elsewhere")
    with pytest.raises(EplbError, match=r"file\.json"):
        reader(path)


@pytest.mark.parametrize(
    "content",
    [
        b"window,layer,expert,count\n0,0,0,1\0\n",
        b"window,layer,expert,count\n0,0,0,=1+1\n",
        b"window,layer,expert,count\n0,0,0," + b"9" * 10**5 + b"\n",
        b"window,layer,expert,count\n0,0,99999999999999999999,1\n",
        b"window,layer,expert,count\n0,0,1048576,1\n",
        b"window,layer,expert,count\n0,0,0\n",
        b"window,layer,expert,count\n0,0,0,nan\n",
        b"window,layer,expert,count\n0,0,0,-1\n",
        "window,layer,expert,count\n0,0,0,1\n".encode("utf-16"),
        b"window,layer,expert,count\n0,0,0,\xff\n",
        b"window,window,layer,expert,count\n0,0,0,0,1\n",
        b'"window,layer\n' * 1000,
        b"," * 10**6,
    ],
    ids=range(13),
)
def test_tables_of_garbage_are_refused(content, tmp_path):
    path = tmp_path / "load.csv"
    path.write_bytes(content)
    refuse("read_trace", path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "..",
        "C:\\secret",
        "a\\..\\secret",
        "\0",
        "",
        3,
        None,
        ["a"],
        {"a": 1},
    ],
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"up": name}}))
    for path in (folder, index):
        with pytest.raises(EplbError) as caught:
            rows(path)
        assert "model" in str(caught.value)


@pytest.mark.parametrize(
    "found", [None, 3, (), ("up",), ("up", 1.5), ("up", True), ("up", "0"), (3, 0), ["up", 0], b"up"]
)
def test_a_name_that_is_none_is_refused(found, tmp_path):
    _write_checkpoint(tmp_path / "model.safetensors")
    with (
        CheckpointRows(tmp_path, lambda *_: found) as rows,
        pytest.raises(EplbError, match="`name_of` must give a key, or a key and a row"),
    ):
        rows(0, "up", 0)


COMMANDS = [
    ["plan", "FILE", "--ranks", "2"],
    ["simulate", "FILE", "--ranks", "2"],
    ["advise", "FILE", "--ranks", "2"],
    ["convert", "FILE", "out.npz"],
    ["verify", "FILE", "FILE", "--ranks", "2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_commands_end_with_a_sentence_for_hostile_files(command, tmp_path):
    """In one process for all files of a command, with little room for memory, and no traceback."""
    noise = np.random.default_rng(1).bytes(1000)
    contents = {"a.npz": noise, "b.json": b"[" * 10**5, "c.csv": b"\0" * 100, "d.npy": noise, "e.npz": b""}
    files = [tmp_path / name for name in contents]
    for file in files:
        file.write_bytes(contents[file.name])
    os.mkfifo(tmp_path / "f.npz")
    (tmp_path / "g.npz").symlink_to(tmp_path / "g.npz")
    lines = [
        [part.replace("FILE", str(f)) for part in command] for f in (*files, tmp_path / "f.npz", tmp_path / "g.npz")
    ]
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "from typer.testing import CliRunner\nfrom eplb_core.commands import app\n"
        f"for line in {lines!r}:\n"
        "    done = CliRunner().invoke(app, line)\n"
        "    assert done.exit_code == 2, (line, done.exit_code, done.output, done.exception)\n"
        "    assert isinstance(done.exception, SystemExit) and 'Traceback' not in done.output, line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
