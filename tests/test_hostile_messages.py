"""Messages about bad input are short and cheap, however much of it is bad."""

import tracemalloc

import numpy as np
import pytest

from eplb_core import (
    EplbError,
    LostExpertsError,
    MovePlan,
    Topology,
    apply_moves,
    check_placement,
    derive_maps,
    preserve_slots,
    rebalance,
    round_robin,
    schedule_rounds,
)
from eplb_core._checks import at, listing, positions, require, shown


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("unprintable")


def test_the_first_places_are_named_in_order_and_the_others_counted():
    bad = np.zeros((3, 70_000), dtype=bool)
    bad[0, 5] = bad[2, [1, 69_999]] = True
    assert at(bad) == "[(0, 5), (2, 1), (2, 69999)]"
    assert at(bad.T) == "[(1, 2), (5, 0), (69999, 2)]"
    assert at(np.ones((2, 5), dtype=bool)).endswith("(0, 4), (1, 0), (1, 1), (1, 2), and 2 more]")
    assert at(np.zeros((2, 3), dtype=bool)) == at(np.zeros((0, 3), dtype=bool)) == "[]"
    assert positions(np.asarray(True)) == [()]


@pytest.mark.parametrize("order", ["C", "F"])
def test_places_take_no_memory_for_each_bad_entry(order):
    bad = np.ones((1000, 10_000), dtype=bool, order=order)
    tracemalloc.start()
    text = at(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.endswith("and 9999992 more]")
    assert len(text) < 300
    assert peak < 2**21  # of 10 MB that are bad


def test_a_list_is_cut_without_being_copied():
    tracemalloc.start()
    text = listing(range(10**9))
    lazy = listing(iter(range(100_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text == "[0, 1, 2, 3, 4, 5, 6, 7, and 999999992 more]"
    assert lazy.endswith("and 99992 more]")
    assert peak < 2**16
    assert listing(["a" * 10**6] * 9) == f"[{', '.join(['a' * 160] * 8)}, and 1 more]"
    assert listing([]) == "[]"


@pytest.mark.parametrize(
    "value",
    [10**5000, "a" * 10**6, list(range(10**6)), {i: i for i in range(10**5)}, Unprintable(), [Unprintable()] * 9]
    + [np.zeros(10**6), [[[[[[[[1]]]]]]]]],
    ids=range(8),
)
def test_any_value_is_shown_in_few_characters(value):
    assert 0 < len(shown(value)) < 300


def test_a_message_is_cut():
    with pytest.raises(EplbError) as caught:
        require(False, "a rule", "b" * 10**6, "An advice.")
    assert len(str(caught.value)) < 460
    assert str(caught.value).endswith("... An advice.")


def test_a_placement_that_is_all_wrong_is_refused_in_few_characters():
    topology = Topology(64, 16)
    wrong = np.full((94, 1024), 777, dtype=np.int32)
    for call in (
        lambda: check_placement(wrong, topology, 256),
        lambda: check_placement(wrong * -1, topology, 256),
        lambda: check_placement(wrong % 2, topology, 256),
        lambda: rebalance(np.full((94, 256), np.nan), topology),
        lambda: rebalance(-np.ones((94, 256)), topology),
    ):
        with pytest.raises(EplbError) as caught:
            call()
        assert len(str(caught.value)) < 400
        assert " more]" in str(caught.value)


def test_lost_experts_are_all_listed_as_data_and_few_in_words():
    error = LostExpertsError([(0, expert) for expert in range(10_000)])
    assert len(error.lost) == 10_000
    assert len(str(error)) < 300


@pytest.mark.parametrize(("ids", "message"), [([[0, 2**20]], "ids < 1048576"), ([[0, 2**32]], "ids < 1048576")])
def test_ids_that_only_damage_explains_are_refused_before_anything_is_as_large(ids, message):
    """An id of 2**32 is not taken for 0, which it is in 32 bits."""
    with pytest.raises(EplbError, match=message):
        preserve_slots(np.asarray(ids), [[0, 1]], Topology(1, 2))
    with pytest.raises(EplbError, match=message):
        check_placement(np.asarray(ids), Topology(1, 2), allow_lost=True)


def test_sizes_that_no_memory_could_hold_are_refused_at_once():
    plan = MovePlan(np.asarray([[0, 2]]))
    for call, message in (
        (lambda: Topology(2**14, 2**16), "at most 1048576 slots"),
        (lambda: round_robin(10**9, 2, Topology(64, 16)), "entries of memory"),
        (lambda: derive_maps(np.zeros((1, 2**16), int), 2**16), "entries of memory"),
        (lambda: derive_maps([[0, 1]], 2**40), "integer 1..1048576"),
        (lambda: apply_moves([[5, 6]], plan), r"larger slots at \(layer, slot\) \[\(0, 1\)\]"),
        (lambda: schedule_rounds(plan, Topology(2, 1)), r"larger slots at \(layer, slot\) \[\(0, 1\)\]"),
    ):
        with pytest.raises(EplbError, match=message):
            call()
