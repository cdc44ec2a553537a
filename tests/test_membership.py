"""Who is in the group: members are threads that share a store, dead when their pulse stops."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from eplb_core import EplbError
from eplb_torch.elastic import membership as membership_module
from eplb_torch.elastic.membership import Evicted, Membership, MembershipError, MembersLost

SILENCE, TIMEOUT = 1.0, 4.0


def on_threads(*functions, timeout=60.0):
    """Results or exceptions of functions that run at the same time."""
    results: list = [None] * len(functions)

    def body(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a member hangs"
    return results


def found(names, nodes=None, store=None):
    """A founded group: its memberships in rank order."""
    store = dist.HashStore() if store is None else store
    nodes = nodes or ["host"] * len(names)
    times = {"silence": SILENCE, "timeout": TIMEOUT}
    members = [Membership(store, name=name, node=node, **times) for name, node in zip(names, nodes, strict=True)]
    lists = on_threads(*(lambda i=i: members[i].found(i, len(names)) for i in range(len(names))))
    assert all(not isinstance(result, Exception) for result in lists), lists
    return sorted(members, key=lambda member: member.members.rank)


def renew_all(members, **options):
    return on_threads(*(lambda member=member: member.renew(**options) for member in members))


def test_first_members_are_ranked_as_they_say_and_by_node():
    members = found("abcd", ["x", "y", "x", "y"])
    assert [member.name for member in members] == ["a", "c", "b", "d"]
    for rank, member in enumerate(members):
        assert member.members == (0, ("a", "c", "b", "d"), ("x", "x", "y", "y"), rank)
        assert member.members.name == member.name
        assert (member.members.size, member.members.num_nodes) == (4, 2)


def test_survivors_keep_their_order_and_agree_within_the_silence():
    members = found("abcde", ["x", "x", "y", "y", "z"])
    for dead in (members[1], members[4]):
        dead.leave()
    start = time.monotonic()
    lists = renew_all([members[0], members[2], members[3]])
    assert SILENCE * 0.9 < time.monotonic() - start < TIMEOUT
    assert [result[:3] for result in lists] == [(1, ("a", "c", "d"), ("x", "y", "y"))] * 3
    assert [result.rank for result in lists] == [0, 1, 2]
    assert lists[0].num_nodes == 1


def test_nobody_is_waited_for_when_all_come():
    members = found("abc")
    start = time.monotonic()
    lists = renew_all(members)
    assert time.monotonic() - start < SILENCE
    assert {result.names for result in lists} == {("a", "b", "c")}


def test_a_living_member_is_waited_for_far_longer_than_a_silent_one():
    members = found("abc")

    def late():
        time.sleep(2.2 * SILENCE)
        return members[1].renew()

    lists = on_threads(members[0].renew, late, members[2].renew)
    assert {result.names for result in lists} == {("a", "b", "c")}


def test_a_living_member_that_does_not_come_is_left_behind_and_learns_it():
    members = found("abc")
    start = time.monotonic()
    lists = renew_all(members[:2])
    assert TIMEOUT <= time.monotonic() - start < TIMEOUT + SILENCE
    assert [result.names for result in lists] == [("a", "b")] * 2
    with pytest.raises(Evicted, match="c is not in generation 1"):
        members[2].renew()


def test_a_suspect_gets_only_the_silence():
    members = found("abc")
    start = time.monotonic()
    lists = renew_all(members[:2], suspects=["c"])
    assert SILENCE * 0.9 < time.monotonic() - start < TIMEOUT
    assert [result.names for result in lists] == [("a", "b")] * 2
    # And one that comes is in, whatever others thought of it.
    lists = renew_all(members[:2], suspects=["b"])
    assert [result.names for result in lists] == [("a", "b")] * 2


@pytest.mark.parametrize(("names", "coming", "wins"), [("abc", [2], False), ("ab", [1], False), ("ab", [0], True)])
def test_a_minority_of_the_living_gives_up_itself(names, coming, wins):
    members = found(names)
    results = renew_all([members[i] for i in coming])
    if wins:
        assert results[0].names == ("a",)
        return
    assert isinstance(results[0], MembershipError)
    assert "Too few to go on without the others" in str(results[0])
    members[coming[0]].leave()
    lists = renew_all([member for i, member in enumerate(members) if i not in coming])
    assert {result.names for result in lists} == {tuple(n for i, n in enumerate(names) if i not in coming)}


def test_the_last_one_goes_on_alone_when_all_others_are_dead():
    members = found("abcd")
    for member in members[:3]:
        member.leave()
    assert members[3].renew().names == ("d",)


def wait_for(look, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_who_waits_is_seen_and_let_in_beside_its_node():
    store = dist.HashStore()
    members = found("abc", ["x", "x", "y"], store)
    assert members[0].waiting() == ()
    new = {name: Membership(store, name=name, node="x", silence=SILENCE, timeout=TIMEOUT) for name in ("d", "e")}
    assert new["d"].latest() == ("a", "b", "c")
    dead = Membership(store, name="f", node="x", silence=SILENCE, timeout=TIMEOUT)
    dead.leave()

    def serve():
        threading.Thread(target=lambda: on_threads(lambda: dead.join(0.1)), daemon=True).start()
        wait_for(lambda: set(members[0].waiting()) == {"d", "e"})
        return renew_all(members, joining=["d", "e", "f"])

    # f is dead: it is let in by those who have not watched it, and then found silent like any member.
    joined_d, joined_e, lists = on_threads(lambda: new["d"].join(20.0), lambda: new["e"].join(20.0), serve)
    assert lists[0].names[:4] == ("a", "b", "d", "e")
    assert joined_d.names == joined_e.names == lists[0].names
    assert (joined_d.rank, joined_e.rank, lists[2].rank) == (2, 3, lists[0].names.index("c"))
    assert members[0].waiting() == ()
    assert members[0].latest() == lists[0].names


def test_who_is_let_in_twice_is_in_once():
    """As when the generation with the newcomer breaks, and members try again."""
    store = dist.HashStore()
    members = found("ab", store=store)
    new = Membership(store, name="c", silence=SILENCE, timeout=TIMEOUT)
    for generation in (1, 2, 3):
        first = (lambda: new.join(5.0)) if generation == 1 else (lambda: new.renew(joining=["c"]))
        lists = on_threads(first, *(lambda m=m: m.renew(joining=["c", "c"]) for m in members))
        assert [result[:2] for result in lists] == [(generation, ("a", "b", "c"))] * 3


def test_who_was_not_let_in_gives_up_and_is_not_listed_any_more():
    store = dist.HashStore()
    members = found("ab", store=store)
    new = Membership(store, name="c", silence=SILENCE, timeout=TIMEOUT)
    with pytest.raises(MembershipError, match="not let in within 0.5 s"):
        new.join(0.5)
    for _ in range(3):
        assert members[0].waiting() == ()
        time.sleep(0.3 * SILENCE)


def test_members_who_leave_are_not_waited_for():
    members = found("abc")
    start = time.monotonic()
    lists = renew_all(members[1:], leaving=["a"])
    assert time.monotonic() - start < SILENCE
    assert [result.names for result in lists] == [("b", "c")] * 2


def test_meeting_ends_when_all_came_or_one_never_will():
    members = found("abc")
    assert on_threads(*(lambda m=m: m.meet("start", 5.0) for m in members)) == [None] * 3
    members[2].check()
    start = time.monotonic()
    results = on_threads(*(lambda m=m: m.meet("late", 0.3) for m in members[:2]))
    assert all(isinstance(result, MembersLost) and result.names == ("c",) for result in results)
    assert time.monotonic() - start < SILENCE
    members[2].leave()
    results = on_threads(*(lambda m=m: m.meet("dead", 30.0) for m in members[:2]))
    assert all("no sign of life" in str(result) and result.names == ("c",) for result in results)


def test_a_generation_is_over_for_all_when_one_begins_the_next():
    members = found("abc")

    def waits():
        with pytest.raises(MembersLost, match="begun generation 1") as caught:
            members[1].meet("never", 30.0)
        assert caught.value.names == ()
        return members[1].renew()

    lists = on_threads(members[0].renew, waits, members[2].renew)
    assert {result.names for result in lists} == {("a", "b", "c")}


def test_notes_are_read_by_name():
    members = found("ab")
    assert members[0].told("b") is None
    members[1].tell("seven")
    assert members[0].told("b") == "seven"


def test_founding_without_all_ends_in_time_and_says_who_is_missing():
    member = Membership(dist.HashStore(), name="a", silence=0.2, timeout=0.4)
    with pytest.raises(MembershipError, match=r"ranks \[1, 2\] did not come in 0.4 s"):
        member.found(0, 3)


def test_a_store_with_another_group_in_it_is_refused():
    store = dist.HashStore()
    found("ab", store=store)
    other = Membership(store, name="z", silence=SILENCE, timeout=TIMEOUT)
    with pytest.raises(MembershipError, match=r"another group, \[a, b\]"):
        other.found(0, 2)


@pytest.mark.parametrize("fault", ["hangs", "raises"])
def test_a_store_that_fails_is_an_error_and_never_a_hang(fault, monkeypatch):
    monkeypatch.setattr(membership_module, "_STORE_SECONDS", 0.5)
    members = found("a")
    gone = threading.Event()

    def fail(*_):
        if fault == "hangs":
            gone.wait(30)
        raise RuntimeError("connection reset")

    monkeypatch.setattr(members[0]._roll, "_store", type("Failing", (), {"check": fail, "set": fail})())
    with pytest.raises(MembershipError, match="did not answer" if fault == "hangs" else "connection reset"):
        members[0].check()
    gone.set()


def test_bad_arguments_are_refused():
    with pytest.raises(EplbError, match="silence <= timeout"):
        Membership(dist.HashStore(), silence=3.0, timeout=2.0)
    member = Membership(dist.HashStore())
    with pytest.raises(EplbError, match="Call found or join"):
        member.members  # noqa: B018
    with pytest.raises(EplbError, match="0..size-1"):
        member.found(2, 2)


@pytest.mark.parametrize("seed", range(6))
def test_whoever_dies_when_all_who_are_left_end_up_in_one_list(seed):
    """Members come late, die before they came, while they agree, or right after; the rest renew until all meet."""
    rng = random.Random(seed)
    names = "abcdefg"[: rng.randrange(3, 8)]
    members = found(names)
    doomed = set(rng.sample(range(len(names)), rng.randrange(1, len(names))))
    plans = [(rng.uniform(0, 0.5), rng.uniform(0, 2.5 * SILENCE) if i in doomed else None) for i in range(len(names))]

    def live(i):
        delay, death = plans[i]
        if death is not None:
            threading.Timer(death, members[i].leave).start()
        time.sleep(delay)
        seen = []
        while True:
            if death is not None and delay > death:
                return seen
            seen.append(members[i].renew())
            try:
                # A doomed member never meets the others, as if it had died between the agreement and this.
                members[i].meet("alive", 10.0) if death is None else time.sleep(3 * SILENCE)
            except MembersLost:
                continue
            return seen

    results = on_threads(*(lambda i=i: live(i) for i in range(len(names))))
    left = [i for i in range(len(names)) if i not in doomed]
    expected = tuple(names[i] for i in left)
    for i in left:
        assert not isinstance(results[i], Exception), results
        assert results[i][-1].names == expected
    lists: dict[int, set] = {}
    for result in results:
        for one in result if isinstance(result, list) else []:
            lists.setdefault(one.generation, set()).add(one.names)
    assert all(len(different) == 1 for different in lists.values()), lists


def test_keys_of_a_generation_are_its_own():
    store = dist.HashStore()
    members = found("ab", store=store)
    members[0].store.set("k", "old")
    renew_all(members)
    assert not members[0].store.check(["k"])
    members[0].store.set("k", "new")
    members[1].store.wait(["k"], timedelta(seconds=1))
    assert members[1].store.get("k") == b"new"
