"""Hooks for pytest: what needs a library that is not installed is skipped, and the report names the library.

Only libraries of the extras count. A failed import of anything else stays an error, and so does a library that is
missing while a test runs: `tests/test_imports.py` says what must work without them.
"""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

EXTRAS = frozenset(
    ("array_api_strict", "beartype", "jax", "matplotlib", "prometheus_client", "pydantic", "rich", "safetensors")
    + ("scipy", "torch", "transformers", "typer", "yaml")
)
"""What the extras bring, by the names under which they are imported."""

IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)


class OptionalModule(pytest.Module):
    """A test module that is skipped when its imports, or theirs, end at a library of an extra."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            name = getattr(error.__cause__, "name", None) or ""
            if isinstance(error.__cause__, ModuleNotFoundError) and name.partition(".")[0] in EXTRAS:
                pytest.skip(f"needs {name}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Collect test modules as `OptionalModule`."""
    return OptionalModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the doctests whose text imports a library of an extra that is not installed."""
    for item in items:
        test = getattr(item, "dtest", None)
        missing = absent(test) if isinstance(test, doctest.DocTest) else ()
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


def absent(test: doctest.DocTest) -> list[str]:
    """List the libraries of extras that `test` imports and that are not installed."""
    names = {name for example in test.examples for name in IMPORT.findall(example.source)}
    return sorted(name for name in names & EXTRAS if importlib.util.find_spec(name) is None)
