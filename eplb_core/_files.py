"""Files that are written whole or not at all, and read without trust."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from eplb_core._checks import EplbError, check_kind, require, shown

PathLike = str | os.PathLike[str]


def check_path(path: Any, name: str = "path") -> None:
    """Refuse what is no path: an integer, say, is a file that is open already, and reading it may never end."""
    check_kind(path, (str, os.PathLike), name)
    require(
        isinstance(os.fspath(path), str) and "\0" not in os.fspath(path),
        f"`{name}` must be text without NUL characters",
        shown(path),
        "Check where it comes from.",
    )


@contextmanager
def writing(path: PathLike) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the context ends well, and vanishes when it does not.

    A reader, or a restart after a crash, sees the old content or the new one, never a part: the bytes are on disk
    before the name changes. A symbolic link is followed.

    Raises:
        OSError: if the folder is missing or full; `path` is unchanged then.
    """
    check_path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


@contextmanager
def reading(path: PathLike, limit_bytes: int) -> Iterator[BinaryIO]:
    """Open a file of at most `limit_bytes`; whatever fails in the context is the file's fault.

    Raises:
        EplbError: naming the file and what is wrong with it.
    """
    check_path(path)
    try:
        # Anything but a regular file may block, or never end; it may also take the place of one in the meantime.
        require(os.path.isfile(path), f"`{path}` must be a file", "none", "Check the path.")
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            require(stat.S_ISREG(status.st_mode), f"`{path}` must be a file", "another kind", "Check the path.")
            require(
                status.st_size <= limit_bytes,
                f"`{path}` must have at most {limit_bytes} bytes",
                f"{status.st_size} bytes",
                "Raise the limit if you trust the file.",
            )
            yield file
    except EplbError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__)[:200]
        raise EplbError(f"`{path}` cannot be read; got {reason}. Check that it is whole and of this format.") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would block


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
