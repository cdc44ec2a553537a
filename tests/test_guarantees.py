"""The page of guarantees names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_is_named_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("tests", "property_tests")
        for path in (ROOT / folder).glob("*.py")
    ]
    functions = {name for source in sources for name in re.findall(r"^\s*def (test_\w+)", source, re.MULTILINE)}
    named = re.findall(r"`((?:tests/|property_tests/)?test_\w+(?:\.py)?)`", page)
    assert len(named) > 40
    assert [name for name in named if not (name in functions or (ROOT / name).is_file())] == []
