"""SGLang's recordings, as `.pt`: windows of counts (`stat`), or forward passes with their map (`detail`)."""

import importlib.util
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from eplb_core._checks import EMPTY, EplbError, require
from eplb_core._files import PathLike, reading, writing
from eplb_core._npz import _SmallReads
from eplb_core.formats.values import load_of, placement_of

_PICKLE_SHARE = 32
"""A pickle may take this much less than all; objects take more room than their bytes."""

_BEGIN = b"PK\3\4"
_KNOWN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")


def read_recording(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return load and metadata of a recording, or of a folder with the `detail` recordings of all ranks."""
    if os.path.isdir(path):
        files = sorted(Path(path).glob("*.pt"))
        require(bool(files), f"`{path}` must have .pt files", "none", "Name the folder that SGLang dumped to.")
        return _passes(path, ((file, _read(file, limit_bytes)) for file in files), limit_bytes)
    value = _read(path, limit_bytes)
    if "records" in value:
        return _passes(path, [(path, value)], limit_bytes)
    require(
        "logical_count" in value,
        f"`{path}` must be a recording, with `logical_count` or `records`",
        f"keys {sorted(map(str, value))[:8]}",
        "Dump it with /dump_expert_distribution_record.",
    )
    load = load_of(_array(value["logical_count"], path, limit_bytes), path)
    last = int(np.flatnonzero(load.any(axis=(1, 2)))[-1]) + 1 if load.any() else len(load)
    unused = {"unused_windows": len(load) - last} if last < len(load) else {}
    return load[:last], {"recorder": "sglang stat"} | unused


def read_placement(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement of a `.pt` for `--init-expert-location`, or the last one of a `detail` recording."""
    value = _read(path, limit_bytes)
    key = next((key for key in ("physical_to_logical_map", "last_physical_to_logical_map") if key in value), None)
    require(
        key is not None,
        f"`{path}` must have a placement as `physical_to_logical_map`",
        f"keys {sorted(map(str, value))[:8]}",
        "If it holds loads, make a placement with `eplb plan`.",
    )
    return placement_of(_array(value[key], path, limit_bytes), path), {}


def write_recording(path: PathLike, load: np.ndarray) -> None:
    """Write counts as SGLang's `stat` recorder does."""
    _write(path, {"rank": 0, "logical_count": load, "average_utilization_rate_over_window": None})


def write_placement(path: PathLike, physical_to_logical: np.ndarray) -> None:
    """Write a placement for `--init-expert-location`."""
    _write(path, {"physical_to_logical_map": physical_to_logical.astype(np.int64)})


def _passes(
    source: PathLike, files: Iterable[tuple[PathLike, dict]], limit_bytes: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """One window per forward pass: the counts of all ranks, by the map that their file ends with."""
    seen: set[tuple] = set()
    total: dict[int, np.ndarray] = {}
    for path, value in files:
        records, placement = _records(value, path, limit_bytes)
        layer, slot = np.nonzero(placement != EMPTY)
        shape = (len(placement), int(placement.max()) + 1)
        for record in records:
            key, counts = _record(record, path, limit_bytes)
            window = total.setdefault(key[0], np.zeros(shape, np.int64))
            require(
                key not in seen and counts.shape == placement.shape and window.shape == shape,
                f"`{path}` must have one record per pass and rank, each `[layers, slots]` as its map",
                f"{key} with counts {counts.shape}, map {placement.shape}, {shape[1]} experts",
                "Put the recordings of one run into a folder of their own.",
            )
            require(
                len(total) * window.nbytes <= limit_bytes,
                f"`{path}` must unpack to at most {limit_bytes} bytes",
                f"{len(total)} passes and more",
                "Raise the limit if you trust the file.",
            )
            seen.add(key)
            np.add.at(window, (layer, placement[layer, slot]), counts[layer, slot])
    require(bool(total), f"`{source}` must have records", "none", "Record at least one forward pass.")
    load = load_of(np.stack([total[number] for number in sorted(total)]), source)
    note = "counts were converted with the last map; passes before a rebalance had another"
    return load, {"recorder": "sglang detail", "forward_pass_ids": sorted(total), "note": note}


def _records(value: dict, path: PathLike, limit_bytes: int) -> tuple[list, np.ndarray]:
    records, last = value.get("records"), value.get("last_physical_to_logical_map")
    require(
        isinstance(records, list) and last is not None,
        f"`{path}` must have `records` and `last_physical_to_logical_map`",
        f"keys {sorted(map(str, value))[:8]}",
        "Record with --expert-distribution-recorder-mode per_pass.",
    )
    return records or [], placement_of(_array(last, path, limit_bytes), path)


def _record(record: Any, path: PathLike, limit_bytes: int) -> tuple[tuple[int, int, str], np.ndarray]:
    good = isinstance(record, dict) and all(type(record.get(key)) is int for key in ("forward_pass_id", "rank"))
    require(
        good and "global_physical_count" in record,
        f"`{path}` must have records with forward_pass_id, rank and global_physical_count",
        f"{sorted(map(str, record))[:8] if isinstance(record, dict) else type(record).__name__}",
        "Record with --expert-distribution-recorder-mode per_pass, per_token or stat.",
    )
    counts = load_of(_array(record["global_physical_count"], path, limit_bytes), path)
    return (record["forward_pass_id"], record["rank"], str(record.get("gatherer_key"))), counts[0]


def _read(path: PathLike, limit_bytes: int) -> dict:
    """Load a file as torch does with `weights_only`, after a look at its sizes, checksums and what it would call."""
    with reading(path, limit_bytes) as file:
        if _SmallReads(file).read(len(_BEGIN)) != _BEGIN:  # torch would read it as the older format, unchecked
            raise ValueError("no archive of torch.save")
        file.seek(0)
        with zipfile.ZipFile(_SmallReads(file)) as archive:
            _check_archive(archive, limit_bytes)
        require(
            importlib.util.find_spec("torch") is not None,
            f"`{path}` needs torch to be read",
            "no torch",
            "Install it with: pip install 'eplb[torch]'",
        )
        import torch

        file.seek(0)
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's own advice is to load the file unsafely
            raise ValueError(f"a file that torch does not load with weights_only ({type(error).__name__})") from None
    require(isinstance(value, dict), f"`{path}` must hold a dict", type(value).__name__, "Is it a recording?")
    return value


def _check_archive(archive: zipfile.ZipFile, limit_bytes: int) -> None:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("an archive that torch.save does not write")
    (pickle,) = (member for member in members if member.filename.endswith("/data.pkl"))
    if sum(member.file_size for member in members) > limit_bytes or pickle.file_size > limit_bytes // _PICKLE_SHARE:
        raise ValueError(f"more than {limit_bytes} bytes, or a pickle of {pickle.file_size}")
    if (damaged := archive.testzip()) is not None:
        raise ValueError(f"a wrong checksum of {damaged}")
    for opcode, argument, _ in pickletools.genops(archive.read(pickle)):
        if opcode.name == "GLOBAL" and not _KNOWN.fullmatch(str(argument)):
            raise ValueError(f"a pickle that calls {argument}")


def _array(value: Any, path: PathLike, limit_bytes: int) -> np.ndarray:
    import torch

    if type(value) is not torch.Tensor or value.layout != torch.strided or value.numel() * 8 > limit_bytes:
        what = f"{tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise EplbError(f"`{path}` must hold plain tensors of at most {limit_bytes} bytes; got {what}. Record again.")
    return value.detach().numpy()


def _write(path: PathLike, value: dict[str, Any]) -> None:
    require(
        importlib.util.find_spec("torch") is not None,
        f"`{path}` needs torch to be written",
        "no torch",
        "Install it with: pip install 'eplb[torch]'",
    )
    import torch

    tensors = {key: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x for key, x in value.items()}
    with writing(path) as file:
        torch.save(tensors, file)
