"""What needs a library that is not installed is skipped."""

from tests.extras import pytest_collection_modifyitems, pytest_pycollect_makemodule

__all__ = ("pytest_collection_modifyitems", "pytest_pycollect_makemodule")
