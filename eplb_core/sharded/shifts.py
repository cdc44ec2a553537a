"""Rounds whose rank pairs are known before any plan is, so that one compiled program serves every plan."""

from collections import deque
from typing import NamedTuple

import numpy as np


class ShiftRounds(NamedTuple):
    """Messages in rounds of fixed pairs: in round `i` every rank `r` may send to rank `(r + shift[i]) % ep_size`.

    A message has one leg, or two: then a third rank keeps it in between. Legs are sorted by round, then sender, then
    first legs before second ones.

    shift: int32 `[rounds]`, 1..ep_size-1.
    message: int32 `[legs]` index into the messages that were given.
    round: int32 `[legs]`.
    src_rank: int32 `[legs]` the rank that sends this leg.
    second: bool `[legs]`, the message has come here by a first leg, in an earlier round.
    """

    shift: np.ndarray
    message: np.ndarray
    round: np.ndarray
    src_rank: np.ndarray
    second: np.ndarray


def schedule_shifts(src_rank: np.ndarray, dst_rank: np.ndarray, ep_size: int, *, width: int = 1) -> ShiftRounds:
    """Arrange messages in few rounds in which every rank sends by the same shift.

    In a round a rank sends up to `width` messages to one rank and receives as many from one: `schedule_rounds`'s
    rule, with pairs that do not depend on the plan. As few rounds as all pairs need for themselves would leave most
    ranks idle in most rounds. So a shift gives up rounds that few ranks need, and their messages go by two other
    shifts, `a + b = shift`, through places that are idle anyhow. Rounds of each shift are spread evenly, and messages
    of a pair go in the order given, so that what is near in that order travels at about the same time.
    `O(messages * ep_size + rounds * ep_size^2)`. Runs on the host, the same on every rank.

    Args:
        src_rank: `[messages]` senders.
        dst_rank: `[messages]` receivers, each another rank than the sender.
        ep_size: ranks.
        width: messages that one rank sends in a round, >= 1.

    Returns:
        `ShiftRounds`, never more rounds than if every message went by itself. `len(shift) * width` is at least the
        most messages that a rank sends or receives; with many messages per rank it is little more (`docs/jax.md`).

    References:
        Routing through a third rank: Valiant, "A scheme for fast parallel communication", SIAM J. Comput. 11, 1982.

    >>> rounds = schedule_shifts(np.asarray([0, 0, 1]), np.asarray([1, 1, 2]), ep_size=3)
    >>> rounds.shift.tolist(), rounds.message.tolist(), rounds.round.tolist()
    ([1, 1], [0, 2, 1], [0, 0, 1])
    """
    src_rank = np.asarray(src_rank, dtype=np.int64)
    shift = (np.asarray(dst_rank, dtype=np.int64) - src_rank) % ep_size
    direct = np.zeros((ep_size, ep_size), dtype=np.int64)
    np.add.at(direct, (src_rank, shift), 1)
    rounds, detours = _fewest_rounds(direct, width)
    timetable = _timetable(_spread(rounds), src_rank, shift, detours, ep_size, width)
    plain = -(-direct.max(axis=0) // width)
    if len(timetable.shift) > plain.sum():
        return _timetable(_spread(plain), src_rank, shift, [], ep_size, width)
    return timetable


def _fewest_rounds(direct: np.ndarray, width: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rounds of each shift, and detours: (sender, shift, first shift) of messages that take two legs.

    `direct [ep_size, ep_size]` counts the messages of each sender by shift. Again and again the shift whose last round
    carries least gives it up, if all of that finds its way through idle places.
    """
    used, direct = direct.copy(), direct.copy()
    rounds = -(-direct.max(axis=0) // width)
    detours: list[tuple[int, int, int]] = []
    stuck = rounds == 0
    while not stuck.all():
        excess = np.maximum(used - (rounds - 1) * width, 0).sum(axis=0)
        shift = int(np.where(stuck, np.iinfo(np.int64).max, excess).argmin())
        found = _divert(used, direct, rounds, width, shift)
        if found is None:
            stuck[shift] = True
            continue
        used, direct, more = found
        detours += more
        rounds[shift] -= 1
        stuck = rounds == 0
    return rounds, detours


def _divert(used: np.ndarray, direct: np.ndarray, rounds: np.ndarray, width: int, shift: int):
    """What `_fewest_rounds` becomes when `shift` has one round less, or None if that cannot be."""
    used, direct, detours = used.copy(), direct.copy(), []
    spare = rounds * width - used
    spare[:, shift] -= width
    first = np.asarray([a for a in range(1, len(rounds)) if a != shift], dtype=np.int64)
    second = (shift - first) % len(rounds)
    # Rounds of the lower shift come first where both have but one, so such a detour is never late.
    rank_of_choice = np.where(first < second, 2 * spare.max(initial=1), 0)
    for rank in np.flatnonzero(spare[:, shift] < 0).tolist():
        via = (rank + first) % len(rounds)
        while spare[rank, shift] < 0:
            room = np.minimum(spare[rank, first], spare[via, second])
            if direct[rank, shift] == 0 or room.max(initial=0) <= 0:
                return None
            best = int(np.where(room > 0, room + rank_of_choice, 0).argmax())
            for sender, lane, more in ((rank, first[best], 1), (via[best], second[best], 1), (rank, shift, -1)):
                used[sender, lane] += more
                spare[sender, lane] -= more
            direct[rank, shift] -= 1
            detours.append((rank, shift, int(first[best])))
    return used, direct, detours


def _spread(rounds: np.ndarray) -> list[int]:
    """The shift of every round: each shift's rounds at even distances."""
    shift = np.repeat(np.arange(len(rounds)), rounds)
    turn = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in rounds.tolist()])
    return shift[np.lexsort((shift, turn))].tolist()


def _timetable(shifts: list[int], src_rank, shift_of_message, detours, ep_size: int, width: int) -> ShiftRounds:
    """Give every leg its round: first legs, then second legs, then direct messages, as early as they can.

    Second legs that find no round after the first leg's get rounds of their own at the end.
    """
    waiting, first, second = ([[deque() for _ in range(ep_size)] for _ in range(ep_size)] for _ in range(3))
    for message, (rank, shift) in enumerate(zip(src_rank.tolist(), shift_of_message.tolist(), strict=True)):
        waiting[rank][shift].append(message)
    for rank, shift, lane in detours:
        first[rank][lane].append((waiting[rank][shift].popleft(), (shift - lane) % ep_size))
    legs: list[tuple[int, int, bool, int]] = []
    now = 0
    while now < len(shifts):
        shift, arrived = shifts[now], []
        for rank in range(ep_size):
            room = width
            while room and first[rank][shift]:
                message, lane = first[rank][shift].popleft()
                arrived.append((message, (rank + shift) % ep_size, lane))
                legs.append((now, rank, False, message))
                room -= 1
            for queue, is_second in ((second, True), (waiting, False)):
                while room and queue[rank][shift]:
                    legs.append((now, rank, is_second, queue[rank][shift].popleft()))
                    room -= 1
        for message, rank, lane in arrived:
            second[rank][lane].append(message)
        now += 1
        if now == len(shifts):
            late = [max(len(lanes[lane]) for lanes in second) for lane in range(ep_size)]
            shifts = shifts + [lane for lane in range(ep_size) for _ in range(-(-late[lane] // width))]
    legs.sort(key=lambda leg: leg[:3])
    round_, src_rank, is_second, message = zip(*legs, strict=True) if legs else ((), (), (), ())
    columns = (np.asarray(column, dtype=np.int32) for column in (shifts, message, round_, src_rank))
    return ShiftRounds(*columns, second=np.asarray(is_second, dtype=bool))
