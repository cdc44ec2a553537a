"""Any garbage, anywhere: a function answers, or refuses with `EplbError` and a short message; it writes to nothing."""

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eplb_core import EplbError
from tests.hostile import Argument
from tests.hostile_core import CONTROL, LOADS, PLANNING, SIZES

CALLS = PLANNING | LOADS | CONTROL | SIZES
CASES = sorted((name, argument) for name, call in CALLS.items() for argument in call.arguments)
ARRAYS = [case for case in CASES if CALLS[case[0]].arguments[case[1]].kind in ("load", "ids")]
NUMBERS = st.one_of(st.integers(-3, 20), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
LEAVES = st.one_of(NUMBERS, st.text(max_size=5), st.binary(max_size=5), st.complex_numbers())
DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="="), hnp.integer_dtypes(endianness=">"), hnp.floating_dtypes(), hnp.boolean_dtypes()
)


@pytest.fixture(autouse=True)
def without_type_checks():
    """As users run it: nothing stands before the library's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@st.composite
def arrays(draw, good: np.ndarray) -> np.ndarray:
    """A good array with other entries, another dtype or another shape."""
    shape = draw(st.one_of(st.just(good.shape), st.lists(st.integers(0, 4), max_size=4).map(tuple)))
    array = draw(hnp.arrays(draw(DTYPES), shape))
    if shape == good.shape and draw(st.booleans()):
        keep = draw(hnp.arrays(bool, shape))
        with np.errstate(all="ignore"):
            array = np.where(keep, good.astype(array.dtype), array)
    array.setflags(write=False)
    return array


def values(argument: Argument) -> st.SearchStrategy:
    """Leaves, nests of them and, in place of arrays, arrays."""
    nests = st.recursive(
        LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner), max_leaves=8
    )
    good = np.asarray(argument.value) if argument.kind in ("load", "ids") else np.arange(3)
    return nests | arrays(good)


def answer(name: str, /, **changed):
    """What a call returns, or its refusal; anything else that it raises fails the test."""
    try:
        return CALLS[name](**changed)
    except EplbError as error:
        refusal = error
    assert len(str(refusal)) < 1000
    return refusal


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("begin", range(4))
@given(data=st.data())
def test_any_value_is_answered_or_refused(begin, data):
    name, argument = data.draw(st.sampled_from(CASES[begin::4]))
    value = data.draw(values(CALLS[name].arguments[argument]))
    before = value.copy() if isinstance(value, np.ndarray) else None
    answer(name, **{argument: value})
    if before is not None:
        np.testing.assert_array_equal(value, before)


@given(data=st.data())
def test_one_impossible_entry_is_refused_wherever_it_is(data):
    name, argument = data.draw(st.sampled_from(ARRAYS))
    good = np.asarray(CALLS[name].arguments[argument].value)
    wrong, dtype = data.draw(
        st.sampled_from([(np.nan, float), (np.inf, float), (-(2**40), np.int64), (2**62, np.uint64), (-7, np.int8)])
    )
    if wrong == 2**62 and CALLS[name].arguments[argument].kind == "load":
        wrong = 2**63 + 2**62  # a layer has fewer than 2**63 tokens
    array = good.astype(dtype)
    array[tuple(data.draw(st.integers(0, size - 1)) for size in good.shape)] = wrong
    assert isinstance(answer(name, **{argument: array}), EplbError)


@given(data=st.data())
def test_results_of_whatever_is_accepted_are_finite(data):
    name, argument = data.draw(st.sampled_from([case for case in ARRAYS if case[1] == "load"]))
    good = np.asarray(CALLS[name].arguments[argument].value)
    load = data.draw(hnp.arrays(float, good.shape, elements=st.floats(0, 1e17)))
    for leaf in _numbers(answer(name, **{argument: load})):
        assert np.isfinite(leaf).all(), (name, leaf)


def _numbers(value) -> list[np.ndarray]:
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _numbers(part)]
    array = np.asarray(value) if isinstance(value, np.ndarray | float) else np.zeros(0)
    return [array] if array.dtype.kind == "f" else []
