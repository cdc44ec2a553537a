"""Refuse a wheel or an sdist that holds too much or too little: `wheel_contents.py WHEEL SDIST`."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources(*folders: str) -> set[str]:
    """The Python files of some folders of the repository."""
    return {file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*.py")}


def main(wheel: str, sdist: str) -> None:
    """Compare both archives with the repository."""
    packages = {name for name in sources("eplb_core", "eplb_torch") if not name.endswith("/conftest.py")}
    packages |= {"eplb_core/py.typed", "eplb_torch/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    if held != packages:
        sys.exit(f"wheel: too many {sorted(held - packages)}, missing {sorted(packages - held)}")
    needed = packages | sources("tests", "property_tests", "benchmarks") | {"README.md", "LICENSE", "pyproject.toml"}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if not needed <= held:
        sys.exit(f"sdist: missing {sorted(needed - held)}")


main(*sys.argv[1:])
