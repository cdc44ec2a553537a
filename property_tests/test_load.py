"""Estimators against plain models that keep all windows; slot counts against a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from eplb_core import EMPTY
from eplb_core.load import exponential_decay, last_value, logical_load, sliding_window, trend_forecast

windows = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(npst.arrays(np.int64, shape, elements=st.integers(0, 2**40)), min_size=1, max_size=9)
)


def run(estimator, history):
    state = estimator.init(*history[0].shape)
    for window in history:
        window.setflags(write=False)
        state = estimator.update(state, window)
    return estimator.estimate(state), estimator.windows(state)


@given(windows, st.integers(1, 6))
def test_a_sliding_window_is_the_exact_sum_of_the_last_windows(history, size):
    estimate, count = run(sliding_window(size), history)
    assert estimate.dtype == np.int64
    np.testing.assert_array_equal(estimate, sum(history[-size:]))
    assert count == min(size, len(history))


@given(windows)
def test_the_last_value_is_the_last_window(history):
    estimate, count = run(last_value(), history)
    np.testing.assert_array_equal(estimate, history[-1])
    assert count == 1


@given(windows, st.floats(0.1, 20))
def test_decay_halves_a_windows_weight_every_half_life(history, half_life):
    estimate, count = run(exponential_decay(half_life), history)
    weight = [0.5 ** ((len(history) - 1 - i) / half_life) for i in range(len(history))]
    np.testing.assert_allclose(estimate, sum(w * x for w, x in zip(weight, history, strict=True)), rtol=1e-12)
    np.testing.assert_allclose(count, sum(weight), rtol=1e-12)


@given(windows, st.integers(2, 6), st.integers(1, 4))
def test_the_trend_is_the_least_squares_line_continued(history, size, horizon):
    estimate, count = run(trend_forecast(size, horizon=horizon), history)
    last = np.stack(history[-size:]).astype(float)
    time = np.arange(len(last))
    expected = last[0]
    if len(last) > 1:
        line = np.polynomial.Polynomial
        expected = np.empty(last.shape[1:])
        for at in np.ndindex(expected.shape):
            expected[at] = line.fit(time, last[(slice(None), *at)], 1)(len(last) - 1 + horizon)
    np.testing.assert_allclose(estimate, np.maximum(expected, 0), rtol=1e-6, atol=1e-5 * last.max(initial=1))
    assert count == 1


@pytest.mark.parametrize("estimator", [sliding_window(3), exponential_decay(2.0), trend_forecast(3)])
def test_before_the_first_window_nothing_is_expected(estimator):
    state = estimator.init(2, 3)
    np.testing.assert_array_equal(estimator.estimate(state), np.zeros((2, 3)))
    assert estimator.windows(state) == 0


@given(st.data())
def test_slot_counts_are_credited_to_the_expert_that_the_slot_held(data):
    layers, slots, num_logical = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)))
    ids = data.draw(npst.arrays(np.int32, (layers, slots), elements=st.integers(EMPTY, num_logical - 1)))
    counts = data.draw(npst.arrays(np.int64, (layers, slots), elements=st.integers(0, 2**50)))
    expected = np.zeros((layers, num_logical), dtype=np.int64)
    for at, expert in np.ndenumerate(ids):
        if expert != EMPTY:
            expected[at[0], expert] += counts[at]
    for array in (ids, counts):
        array.setflags(write=False)
    np.testing.assert_array_equal(logical_load(counts, ids, num_logical), expected)
