"""Rounds of fixed pairs: every message arrives, and no rank does two things at once."""

from collections import Counter

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from eplb_core.sharded.shifts import schedule_shifts


@st.composite
def demands(draw):
    """Ranks, a width, and messages between different ranks; sometimes all from or to one."""
    ep_size = draw(st.integers(2, 9))
    size = draw(st.integers(0, 60))
    src = draw(st.lists(st.integers(0, draw(st.integers(0, ep_size - 1))), min_size=size, max_size=size))
    shift = draw(st.lists(st.integers(1, draw(st.integers(1, ep_size - 1))), min_size=size, max_size=size))
    src, shift = np.asarray(src, dtype=np.int32), np.asarray(shift, dtype=np.int32)
    return ep_size, draw(st.integers(1, 4)), src, (src + shift) % ep_size


@given(demands())
def test_every_message_gets_where_it_should(demand):
    """By one leg, or by two with the second in a later round and from where the first ended."""
    ep_size, width, src, dst = demand
    rounds = schedule_shifts(src, dst, ep_size, width=width)
    path = {message: [] for message in range(len(src))}
    for message, now, rank, second in zip(*(column.tolist() for column in rounds[1:]), strict=True):
        assert second == bool(path[message])
        path[message].append((now, rank, (rank + int(rounds.shift[now])) % ep_size))
    for message, legs in path.items():
        assert 1 <= len(legs) <= 2
        assert legs[0][1] == src[message]
        assert legs[-1][2] == dst[message]
        if len(legs) == 2:
            assert legs[0][2] == legs[1][1]
            assert legs[0][0] < legs[1][0]


@given(demands())
def test_a_rank_sends_at_most_width_messages_in_a_round(demand):
    """And as all send by the same shift, it receives from one rank alone, as many at most."""
    ep_size, width, src, dst = demand
    rounds = schedule_shifts(src, dst, ep_size, width=width)
    assert all(1 <= shift < ep_size for shift in rounds.shift.tolist())
    sent = Counter(zip(rounds.round.tolist(), rounds.src_rank.tolist(), strict=True))
    assert max(sent.values(), default=0) <= width
    order = list(zip(rounds.round.tolist(), rounds.src_rank.tolist(), rounds.second.tolist(), strict=True))
    assert order == sorted(order)


# Here detours save a round, and cost two by second legs that are late.
LATE = 4, 2, np.asarray([0, 0, 1, 3, 1, 0, 1, 2, 2, 0]), np.asarray([1, 3, 0, 2, 2, 1, 2, 1, 0, 2])


@given(demands())
@example(LATE)
def test_there_are_no_more_rounds_than_without_detours_and_no_fewer_than_the_busiest_rank_needs(demand):
    ep_size, width, src, dst = demand
    rounds = schedule_shifts(src, dst, ep_size, width=width)
    pairs = Counter(zip(src.tolist(), ((dst - src) % ep_size).tolist(), strict=True))
    direct = sum(
        max((-(-count // width) for (_, lane), count in pairs.items() if lane == shift), default=0)
        for shift in range(1, ep_size)
    )
    busiest = max(np.bincount(src, minlength=ep_size).max(), np.bincount(dst, minlength=ep_size).max())
    assert -(-int(busiest) // width) <= len(rounds.shift)
    assert len(rounds.shift) <= direct


def test_messages_of_one_pair_keep_their_order_if_none_takes_a_detour():
    src, dst = np.zeros(6, dtype=np.int32), np.full(6, 2, dtype=np.int32)
    rounds = schedule_shifts(src, dst, 3, width=2)
    assert rounds.message.tolist() == [0, 1, 2, 3, 4, 5]
    assert rounds.round.tolist() == [0, 0, 1, 1, 2, 2]


def test_idle_places_are_used():
    """Eight messages of one pair fill the idle places of others, instead of eight rounds of their own."""
    src = np.asarray([0] * 8 + [1, 2, 3] * 2, dtype=np.int32)
    dst = np.asarray([1] * 8 + [2, 3, 0, 3, 0, 1], dtype=np.int32)
    without = 8 + 1  # rounds of shift 1 for the pair (0, 1), and of shift 2
    assert len(schedule_shifts(src, dst, 4).shift) <= without
    many = np.random.default_rng(0)
    src = many.integers(0, 8, 400)
    dst = (src + many.integers(1, 8, 400)) % 8
    busiest = max(np.bincount(src).max(), np.bincount(dst).max())
    assert len(schedule_shifts(src, dst, 8).shift) <= 1.1 * busiest
