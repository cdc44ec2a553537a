"""One hypothesis profile for all property tests: the same examples on every machine, no time limit per example.

`property_tests.fuzz` changes it to fresh examples.
"""

from hypothesis import HealthCheck, settings

from tests.extras import pytest_collection_modifyitems, pytest_pycollect_makemodule

__all__ = ("pytest_collection_modifyitems", "pytest_pycollect_makemodule")

settings.register_profile(
    "eplb",
    max_examples=60,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("eplb")
