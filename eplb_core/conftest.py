"""Doctests that need a library that is not installed are skipped. Not part of the wheel."""

from tests.extras import pytest_collection_modifyitems

__all__ = ("pytest_collection_modifyitems",)
