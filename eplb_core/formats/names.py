"""The names of formats, and which one a file's name tells."""

import os

from eplb_core._checks import check_kind, require
from eplb_core._files import PathLike, check_path

_BY_SUFFIX = {
    ".npz": "npz",
    ".npy": "npy",
    ".json": "json",
    ".csv": "csv",
    ".pt": "sglang-pt",
    ".yaml": "tensorrt-llm",
    ".yml": "tensorrt-llm",
}


def by_name(path: PathLike) -> str | None:
    """Return the format that a file's name tells, if any; a folder is `"sglang-pt"`."""
    return "sglang-pt" if os.path.isdir(path) else _BY_SUFFIX.get(os.path.splitext(path)[1].lower())


def choose(path: PathLike, format: str | None, known: tuple[str, ...], function: str) -> str:
    """Return the format that is named, or else the one that the file's name tells.

    Raises:
        EplbError: if it is not among the known ones.
    """
    check_path(path, f"{function}(path=...)")
    check_kind(format, (str, type(None)), f"{function}(format=...)")
    name = format or by_name(path)
    require(
        name in known,
        f"`{function}(format=...)` must be one of {', '.join(known)}",
        f"format={format!r} for {path}",
        "Name the format if the file's ending does not tell it." if format is None else "Choose one of these.",
    )
    return str(name)
