"""The names of formats, and which one a file's name tells."""

import os

from eplb_core._checks import require
from eplb_core._files import PathLike

_BY_SUFFIX = {
    ".npz": "npz",
    ".npy": "npy",
    ".json": "json",
    ".csv": "csv",
    ".pt": "sglang-pt",
    ".yaml": "tensorrt-llm",
    ".yml": "tensorrt-llm",
}


def choose(path: PathLike, format: str | None, known: tuple[str, ...], function: str) -> str:
    """Return the format that is named, or else the one that the file's name tells; a folder is `"sglang-pt"`.

    Raises:
        EplbError: if it is not among the known ones.
    """
    suffix = os.path.splitext(path)[1].lower()
    name = format or ("sglang-pt" if os.path.isdir(path) else _BY_SUFFIX.get(suffix))
    require(
        name in known,
        f"`{function}(format=...)` must be one of {', '.join(known)}",
        f"format={format!r} for {path}",
        "Name the format if the file's ending does not tell it." if format is None else "Choose one of these.",
    )
    return str(name)
