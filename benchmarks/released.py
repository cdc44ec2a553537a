"""Fetch a released Python package and load single modules of it, without installing or importing the rest.

The peers' load balancers sit inside serving engines that import whole GPU stacks. Only their own files are
read here; whatever else they import is replaced by a stand-in, and nothing stays behind in `sys.modules`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peers"
WHEEL_PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_24_x86_64")


class PeerUnavailable(RuntimeError):
    """A peer's release can be neither found in the cache nor downloaded."""


def fetch(requirement: str, folder: str, *, sdist: bool = False) -> Path:
    """Return a directory that holds the files under `folder` of a pinned release, from the cache if it has
    them.

    Args:
        requirement: such as `"sglang==0.5.23"`.
        folder: path inside the release, such as `"sglang/srt/eplb"`.
        sdist: take the source distribution; for projects that publish no wheels.

    Raises:
        PeerUnavailable: if the package index does not deliver it.
    """
    cache = Path(os.environ.get("EPLB_PEERS_CACHE", DEFAULT_CACHE))
    unpacked = cache / requirement
    if (unpacked / folder).is_dir():
        return unpacked
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        found = (_unpack_sdist if sdist else _unpack_wheel)(requirement, folder, Path(scratch))
        unpacked.mkdir(exist_ok=True)
        (unpacked / folder).parent.mkdir(parents=True, exist_ok=True)
        os.replace(found, unpacked / folder)
    return unpacked


def _unpack_wheel(requirement: str, folder: str, scratch: Path) -> Path:
    platforms = [f"--platform={name}" for name in WHEEL_PLATFORMS]
    log = _pip_download(requirement, scratch, "--only-binary=:all:", "--python-version=3.12", *platforms)
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise PeerUnavailable(f"{requirement} could not be downloaded:\n{log}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(folder + "/")])
    return scratch / folder


def _unpack_sdist(requirement: str, folder: str, scratch: Path) -> Path:
    """pip asks for metadata, which needs a device SDK; `--no-clean` keeps what it unpacked."""
    log = _pip_download(requirement, scratch, "--no-binary=:all:", "--no-build-isolation", "--no-clean")
    found = [path for path in scratch.rglob(folder) if path.is_dir()]
    if not found:
        raise PeerUnavailable(f"{requirement} could not be downloaded:\n{log}")
    return found[0]


def _pip_download(requirement: str, scratch: Path, *options: str) -> str:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"--dest={scratch}"]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run([*pip, *options, requirement], capture_output=True, text=True, env=environment)
    return done.stderr[-2000:]


def load(root: Path, names: list[str], *, replace: Mapping[str, ModuleType] | None = None) -> list[ModuleType]:
    """Import modules from their files under `root`; everything else of their package becomes a stand-in.

    Args:
        root: what `fetch` returned.
        names: dotted names, all in one top-level package. They may import each other.
        replace: modules to use instead of what is (or is not) released or installed.
    """
    with installed(root, names[0].partition(".")[0], replace=replace):
        return [importlib.import_module(name) for name in names]


@contextmanager
def installed(
    root: Path, package: str, *, replace: Mapping[str, ModuleType] | None = None, run: Collection[str] = ()
) -> Iterator[None]:
    """Make `import` find a package in its files under `root` while this lasts; the rest of it are stand-ins.

    Args:
        root: what `fetch` returned.
        package: a top-level package. If it is really installed, it is hidden.
        replace: modules to use instead of what is (or is not) released or installed.
        run: packages of which the `__init__` file is run; in others it is not, as it would pull in the engine.
    """
    replace = dict(replace or {})

    def ours(name: str) -> bool:
        return name.partition(".")[0] == package or name in replace

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    finder = _Finder(root, package, run)
    sys.meta_path.insert(0, finder)
    sys.modules.update(replace)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(hidden)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves modules of one package from files, and an empty package of mocks for any name that has no file."""

    def __init__(self, root: Path, package: str, run: Collection[str]) -> None:
        self.root, self.package, self.run = root, package, run

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != self.package:
            return None
        folder = self.root.joinpath(*fullname.split("."))
        if fullname in self.run:
            return importlib.util.spec_from_file_location(
                fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        file = folder.with_suffix(".py")
        if file.is_file():
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class StandIn(ModuleType):
    """A module of which every attribute is a mock, unless it is given."""

    __path__: list[str] = []

    def __init__(self, name: str, **attributes) -> None:
        super().__init__(name)
        vars(self).update(attributes)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        return sys.modules.get(full) or MagicMock(name=full)
