"""What estimators and slot counts refuse."""

import numpy as np
import pytest

from eplb_core import EplbError
from eplb_core.load import exponential_decay, logical_load, sliding_window, trend_forecast


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(0), "must be an integer 1"),
        (lambda: sliding_window(1.5), "must be an integer"),
        (lambda: trend_forecast(1), "must be an integer 2..64"),
        (lambda: trend_forecast(3, horizon=65), "1..64"),
        (lambda: exponential_decay(0), "a finite number 0.001"),
        (lambda: exponential_decay(float("nan")), "finite"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(EplbError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: sliding_window(2), lambda: exponential_decay(2), lambda: trend_forecast(2)])
def test_a_window_that_is_no_count_of_tokens_is_refused(make):
    estimator = make()
    state = estimator.init(1, 3)
    for load, message in (
        (np.ones((1, 4), dtype=np.int64), "must have the shape"),
        (np.ones((1, 3)), "must hold integers"),
        (np.asarray([[1, -1, 0]]), ">= 0"),
    ):
        with pytest.raises(EplbError, match=message):
            estimator.update(state, load)


def test_slot_counts_of_another_shape_or_placement_are_refused():
    with pytest.raises(EplbError, match="placement's shape"):
        logical_load(np.ones((1, 3), dtype=np.int64), np.asarray([[0, 1]]), 2)
    with pytest.raises(EplbError, match="larger ids"):
        logical_load(np.ones((1, 2), dtype=np.int64), np.asarray([[0, 2]]), 2)
