"""Read single experts' tensors from a checkpoint in safetensors files: what a group that lost them loads anew."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from eplb_core._checks import EplbError, check_choice, check_kind, listing, require, shown
from eplb_core._extras import import_extra
from eplb_core._files import check_path
from eplb_core.formats.text import read_json

_NUMPY = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64", "C128")
_MOST_INDEX_BYTES = 2**32  # 2**27 of JSON
FRAMEWORKS = {"numpy": "numpy", "torch": "pt"}


class CheckpointRows:
    """Tensors of single experts, read from disk one by one: `rows(layer, name, expert)`.

    Files are mapped, so only the bytes asked for are read, even of one expert's row in a tensor that holds all experts.
    Keep one of these for as long as it is needed, and `close` it, or use it in a `with` statement. Needs the package
    `safetensors`: `pip install 'eplb[checkpoint]'`.

    Args:
        path: a `.safetensors` file; or an index (`*.safetensors.index.json`) that names such files beside it; or a
            folder with one index, or with `.safetensors` files.
        name_of: `(layer, name, expert) ->` what the checkpoint calls this tensor: a key, or `(key, row)` where one
            tensor holds all experts along its first axis. Its arguments are yours: the layer of the placement, the
            name under which the tensor is registered, the logical expert.
        framework: `"numpy"`, or `"torch"` for tensors on the CPU. NumPy has no bfloat16 and no float8.

    Raises:
        EplbError: if nothing is found at `path`, a file is not what its name says, or the index names files outside
            its folder.

    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> file = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_file({f"layers.0.experts.{e}.down": np.full(2, e) for e in range(4)}, file)
    >>> with CheckpointRows(file, lambda layer, name, expert: f"layers.{layer}.experts.{expert}.{name}") as rows:
    ...     rows(0, "down", 3).tolist()
    [3, 3]
    """

    def __init__(
        self,
        path: Path | str,
        name_of: Callable[[int, str, int], str | tuple[str, int]],
        *,
        framework: str = "numpy",
    ):
        check_choice(framework, tuple(FRAMEWORKS), "CheckpointRows(framework=...)")
        check_path(path, "CheckpointRows(path=...)")
        check_kind(name_of, Callable, "CheckpointRows(name_of=...)")
        self.name_of, self.framework = name_of, framework
        self._opened: dict[Path, Any] = {}
        self._file_of = self._locate(Path(path))

    def __call__(self, layer: int, name: str, expert: int) -> Any:
        """Read one tensor of one expert.

        Returns:
            An array of its own, or a tensor that must not be written to, as it may lie in the mapped file.

        Raises:
            EplbError: if the checkpoint does not hold it, or NumPy does not know its dtype.
        """
        key, row = self._key(layer, name, expert)
        self._refuse_missing([key])
        file = self._open(self._file_of[key])
        part = file.get_slice(key)
        shape = part.get_shape()
        require(
            row is None or (len(shape) > 0 and 0 <= row < shape[0]),
            "`name_of` must give a row that the checkpoint's tensor has",
            f"row {row} of {key!r} with shape {tuple(shape)}",
            "Check how many experts this tensor holds, and which.",
        )
        require(
            self.framework != "numpy" or part.get_dtype() in _NUMPY,
            f"NumPy cannot hold {key!r}",
            f"dtype {part.get_dtype()}",
            "Use `CheckpointRows(framework='torch')`.",
        )
        return file.get_tensor(key) if row is None else part[row]

    def check(self, experts: Iterable[tuple[int, int]], names: Iterable[str]) -> None:
        """Refuse to begin if any tensor of these experts is missing.

        Args:
            experts: (layer, expert) pairs, such as `ElasticPlan.reload`.
            names: of the tensors that every expert has.

        Raises:
            EplbError: listing all keys that the checkpoint lacks, or the files that it names and does not have.
        """
        names = tuple(names)
        keys = dict.fromkeys(self._key(layer, name, expert)[0] for layer, expert in experts for name in names)
        self._refuse_missing(list(keys))
        files = sorted({self._file_of[key] for key in keys})
        gone = [file.name for file in files if not file.is_file()]
        require(
            not gone,
            "the files of a checkpoint must be where its index is",
            f"missing {listing(gone)}",
            "Complete the download.",
        )

    def close(self) -> None:
        """Close all files."""
        while self._opened:
            self._opened.popitem()[1].__exit__(None, None, None)

    def __enter__(self) -> "CheckpointRows":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _key(self, layer: int, name: str, expert: int) -> tuple[str, int | None]:
        found = self.name_of(layer, name, expert)
        if isinstance(found, str):
            return found, None
        require(
            isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], str) and _is_index(found[1]),
            "`name_of` must give a key, or a key and a row",
            shown(found),
            "Correct the function that you gave.",
        )
        return found[0], int(found[1])

    def _refuse_missing(self, keys: list[str]) -> None:
        missing = [key for key in keys if key not in self._file_of]
        if missing:
            near = get_close_matches(missing[0], self._file_of, n=2)
            raise EplbError(
                f"`name_of` must give keys that the checkpoint has; got {listing(map(repr, missing))}, none of its "
                f"{len(self._file_of)} keys. " + (f"Near the first: {listing(map(repr, near))}." if near else "")
            )

    def _locate(self, path: Path) -> dict[str, Path]:
        """The file of every key."""
        if path.is_dir():
            indices = sorted(path.glob("*.safetensors.index.json"))
            files = sorted(path.glob("*.safetensors"))
            require(
                len(indices) == 1 or (not indices and bool(files)),
                "`CheckpointRows(path=...)` must be a folder with one index or with safetensors files",
                f"{len(indices)} indices and {len(files)} files in {str(path)!r}",
                "Name the file or the index.",
            )
            return _read_index(indices[0]) if indices else {key: file for file in files for key in self._keys(file)}
        require(
            path.is_file() and path.name.endswith((".safetensors", ".json")),
            "`CheckpointRows(path=...)` must be a folder, a .safetensors file or an index",
            f"{str(path)!r}",
            "Check the path.",
        )
        return _read_index(path) if path.suffix == ".json" else {key: path for key in self._keys(path)}

    def _keys(self, file: Path) -> list[str]:
        return list(self._open(file).keys())

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            require(file.is_file(), f"{str(file)!r} must be a file", "none", "Complete the download.")  # a pipe blocks
            safetensors = import_extra("safetensors", "checkpoint", "CheckpointRows")
            try:
                self._opened[file] = safetensors.safe_open(file, framework=FRAMEWORKS[self.framework])
            except (safetensors.SafetensorError, OSError) as error:
                raise EplbError(f"{str(file)!r} cannot be read as safetensors; got {error}. Fetch it again.") from error
        return self._opened[file]


def _is_index(row: Any) -> bool:
    return isinstance(row, int | np.integer) and not isinstance(row, bool)


def _read_index(path: Path) -> dict[str, Path]:
    """The file of every key, beside the index or below; never outside its folder."""
    index = read_json(path, _MOST_INDEX_BYTES)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and "\0" not in name for name in names.values()):
        raise EplbError(
            f"{str(path)!r} must be JSON with an object 'weight_map' of keys and file names; got {shown(index)}. "
            "Fetch it again."
        )
    items = {key: PurePosixPath(name) for key, name in names.items()}
    outside = {str(file) for file in items.values() if file.is_absolute() or ".." in file.parts or "\\" in str(file)}
    require(
        not outside,
        f"the index {str(path)!r} must name files of its own folder",
        f"{listing(sorted(outside))}",
        "Do not use checkpoints from people who send you this.",
    )
    return {key: path.parent / file for key, file in items.items()}
