"""JSON files, and which of the known formats one is."""

import json
from typing import Any

import numpy as np

from eplb_core._checks import require
from eplb_core._files import PathLike, reading, writing
from eplb_core.formats.values import load_of, metadata_of

_BYTES_PER_CHARACTER = 32
"""What parsing JSON takes at worst: `[],[],[]` becomes a list of lists."""

KEYS = {
    "load": "json",
    "logical_count": "sglang",
    "physical_to_logical_map": "sglang",
    "layer_list": "vllm-ascend",
}
"""The key by which a JSON object is recognised, and its format."""


def read_json(path: PathLike, limit_bytes: int) -> Any:
    """Return what a JSON file holds; NaN, which JSON does not know, and a key that comes twice are refused."""
    with reading(path, limit_bytes // _BYTES_PER_CHARACTER) as file:
        return json.loads(file.read(), parse_constant=_refuse_constant, object_pairs_hook=_object)


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file that takes the place of `path` at once."""
    with writing(path) as file:
        file.write(json.dumps(value, allow_nan=False).encode() + b"\n")


def json_format(value: Any) -> str:
    """Return the format of what a JSON file holds: `"json"` if no other one is recognised."""
    keys = value if isinstance(value, dict) else {}
    return next((name for key, name in KEYS.items() if key in keys), "json")


def load_from_json(value: Any, path: PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Return load and metadata from nested lists, or from an object with `load` and perhaps `metadata`."""
    if isinstance(value, list):
        return load_of(value, path), {}
    require(
        isinstance(value, dict) and "load" in value,
        f"`{path}` must be nested lists of counts, or an object with `load` or `logical_count`",
        f"{sorted(value)[:8] if isinstance(value, dict) else type(value).__name__}",
        "A placement is not a trace.",
    )
    return load_of(value["load"], path), metadata_of(value.get("metadata"), path)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in which a key comes twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")
