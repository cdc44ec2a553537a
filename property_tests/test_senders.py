"""Who sends: the least busy first, and shifts until the busiest is near the best possible. Guarantee 7 of a plan."""

from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, Topology, plan_moves, schedule_rounds
from eplb_core.moves import senders
from eplb_core.moves.candidates import Jobs
from eplb_core.moves.relief import relieve, relieve_together
from eplb_core.testing import model_candidates, model_fewest_busiest, placement_pairs, read_only
from property_tests.skewed import large_pairs, skewed_placements

PAIRS = st.one_of(placement_pairs(empty=True), placement_pairs(similar=True))
WIDE = st.one_of(PAIRS, placement_pairs(max_ranks_per_node=8, max_slots_per_rank=3, max_nodes=2), large_pairs())


def rank_of(slot, topology):
    return slot // topology.slots_per_rank


def busiest(old, new, source, topology):
    """Most messages that one rank sends in one layer: one per (destination rank, expert)."""
    messages = {}
    for slot, (was, expert, src) in enumerate(zip(old, new, source, strict=True)):
        if was != expert and expert != EMPTY and rank_of(src, topology) != rank_of(slot, topology):
            messages[rank_of(slot, topology), expert] = rank_of(src, topology)
    ranks = list(messages.values())
    return max((ranks.count(rank) for rank in ranks), default=0)


@given(WIDE)
def test_7_the_busiest_sender_is_within_one_message_of_the_best_possible(pair):
    topology, _, old, new = pair
    source = plan_moves(old, new, topology).source_slot
    for rows in zip(old.tolist(), new.tolist(), source.tolist(), strict=True):
        best = model_fewest_busiest(list(model_candidates(*rows[:2], topology).values()))
        assert best <= busiest(*rows, topology) <= best + 1


@given(st.one_of(PAIRS, placement_pairs(max_ranks_per_node=8, max_slots_per_rank=3, max_nodes=1)))
def test_7_holds_for_all_layers_together(pair):
    topology, _, old, new = pair
    schedule = schedule_rounds(plan_moves(old, new, topology), topology)
    most = np.bincount(schedule.src_rank, minlength=topology.ep_size).max()
    candidates = [
        senders
        for rows in zip(old.tolist(), new.tolist(), strict=True)
        for senders in model_candidates(*rows, topology).values()
    ]
    best = model_fewest_busiest(candidates)
    assert best <= most <= best + 1


def halving():
    """Where the first choice is bad: experts of a level are held by half of the ranks of the level before, all busy."""
    ep_size = 16
    levels = [16, 8, 4, 2, 1]
    held = [[rank < level for rank in range(ep_size)] for level in levels for _ in range(level)]
    topology = Topology(2 * ep_size, slots_per_rank=len(held))
    old = np.full((2 * ep_size, len(held)), EMPTY)
    new = old.copy()
    for expert, holders in enumerate(held):
        old[:ep_size, expert][holders] = expert
        new[ep_size + expert % ep_size, expert] = expert
    new[:ep_size] = old[:ep_size]
    return topology, old.reshape(1, -1), new.reshape(1, -1)


def test_7_holds_where_choosing_the_least_busy_in_turn_is_far_from_it():
    topology, old, new = halving()
    source = plan_moves(old, new, topology).source_slot
    best = model_fewest_busiest(list(model_candidates(old[0].tolist(), new[0].tolist(), topology).values()))
    assert best == 2
    assert busiest(old[0].tolist(), new[0].tolist(), source[0].tolist(), topology) <= best + 1


def first_choice(old, new, topology):
    """The sender of each (layer, rank, expert) by the documented order of choosing, and the layers it is final in."""
    jobs, sent, chosen, least = [], [], {}, []
    for layer, rows in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        open_, load = [], [0] * topology.ep_size
        for (rank, expert), ranks in model_candidates(*rows, topology).items():
            if len(ranks) == 1:
                chosen[layer, rank, expert] = min(ranks)
                load[min(ranks)] += 1
            elif ranks:
                num_slots = sum(held == expert and rank_of(p, topology) in ranks for p, held in enumerate(rows[0]))
                slot = min(p for p, e in enumerate(rows[1]) if e == expert and rank_of(p, topology) == rank)
                open_.append((num_slots, slot, rank, expert, sorted(ranks)))
        jobs.append(sorted(open_))
        sent.append(load)
        least.append(max(load))
    for turn in range(max(map(len, jobs))):
        total = [sum(column) for column in zip(*sent, strict=True)]
        for layer, load in enumerate(sent):
            for _, _, rank, expert, ranks in jobs[layer][turn : turn + 1]:
                sender = min(ranks, key=lambda r, load=load: (load[r], total[r], r))
                chosen[layer, rank, expert] = sender
                load[sender] += 1
    return chosen, [
        max(load) <= max(-(-sum(load) // len(load)), most) + 1 for load, most in zip(sent, least, strict=True)
    ]


def check_first_choice(old, new, topology):
    """Check the plan against `first_choice` where that is final, and return in which layers it is."""
    with mock.patch.object(senders, "_TOGETHER", 0):
        source = plan_moves(old, new, topology).source_slot
    chosen, final = first_choice(old, new, topology)
    for (layer, rank, expert), sender in chosen.items():
        if final[layer]:
            slots = [p for p, e in enumerate(new[layer]) if e == expert and rank_of(p, topology) == rank]
            lowest = next(p for p, e in enumerate(old[layer]) if e == expert and rank_of(p, topology) == sender)
            assert source[layer, slots[0]] == lowest
    return final


@given(WIDE)
def test_7_jobs_with_few_candidates_choose_first_and_take_the_least_busy(pair):
    topology, _, old, new = pair
    check_first_choice(old, new, topology)


def test_7_only_layers_in_which_the_first_choice_is_bad_choose_again():
    topology, rng = Topology(9, 2), np.random.default_rng(36)
    old, new = (skewed_placements(rng, topology, num_layers=6, num_logical=5, empty=0) for _ in range(2))
    final = check_first_choice(old, new, topology)
    assert any(final)
    assert not all(final)


@st.composite
def job_lists(draw):
    """Holders and jobs of some layers, and a poor choice of senders: always the first candidate."""
    topology, num_logical = Topology(draw(st.integers(2, 6)), draw(st.integers(1, 3))), draw(st.integers(1, 5))
    num_layers, num_jobs = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    holders, start, stop, sender = [], [], [], []
    for layer in range(num_layers):
        held = draw(st.lists(st.integers(0, num_logical), min_size=topology.num_slots, max_size=topology.num_slots))
        order = sorted(range(topology.num_slots), key=lambda p, held=held: (held[p], p))
        holders += order
        wanted = draw(st.lists(st.integers(0, num_logical + 1), min_size=num_jobs, max_size=num_jobs))
        firsts = [sum(e < w for e in held) for w in wanted]
        counts = [held.count(w) for w in wanted]
        start.append([layer * topology.num_slots + first for first in firsts])
        stop.append([a + count for a, count in zip(start[-1], counts, strict=True)])
        sender.append(
            [rank_of(order[a], topology) if count else EMPTY for a, count in zip(firsts, counts, strict=True)]
        )
    forced = draw(
        st.lists(
            st.sampled_from([0, 0, 0, 1, 3]),
            min_size=num_layers * topology.ep_size,
            max_size=num_layers * topology.ep_size,
        )
    )
    jobs = Jobs(read_only(np.asarray(start)), read_only(np.asarray(stop)))
    forced = read_only(np.asarray(forced, dtype=np.int32).reshape(num_layers, -1))
    return (
        topology,
        read_only(np.asarray(holders, dtype=np.int32)),
        jobs,
        read_only(np.asarray(sender, dtype=np.int32)),
        forced,
    )


def candidates_of(holders, jobs, topology):
    """For each layer, the ranks that may send each job."""
    return [
        [set((holders[a:b] // topology.slots_per_rank).tolist()) for a, b in zip(starts, stops, strict=True)]
        for starts, stops in zip(jobs.start, jobs.stop, strict=True)
    ]


def check_senders(sender, candidates):
    for ranks, row in zip(candidates, sender.tolist(), strict=True):
        assert all(rank in possible if possible else rank == EMPTY for rank, possible in zip(row, ranks, strict=True))


def messages(sender, forced):
    return np.asarray([np.bincount(row[row >= 0], minlength=forced.shape[1]) for row in sender]) + forced


def fewest(candidates, forced):
    """Messages of the busiest sender in the best choice, with those that are forced."""
    fixed = [{rank} for rank, count in enumerate(forced.tolist()) for _ in range(count)]
    return model_fewest_busiest([ranks for ranks in candidates if ranks] + fixed)


@given(job_lists())
def test_relieve_leaves_no_layer_far_from_the_best_choice_whatever_it_starts_from(drawn):
    topology, holders, jobs, sender, forced = drawn
    unavoidable = np.maximum(forced.max(axis=1), -(-messages(sender, forced).sum(axis=1) // topology.ep_size))
    relieved = relieve(holders, jobs, sender, forced, unavoidable.astype(np.int32), topology)
    candidates = candidates_of(holders, jobs, topology)
    check_senders(relieved, candidates)
    for ranks, row, before, after, limit in zip(candidates, forced, sender, relieved, unavoidable, strict=True):
        most, was = messages(after[None], row[None]).max(), messages(before[None], row[None]).max()
        assert most <= max(fewest(ranks, row), limit + 1)
        assert most <= was


@given(job_lists(), st.integers(0, 2))
def test_relieve_together_helps_the_busiest_of_all_within_what_a_layer_allows(drawn, slack):
    topology, holders, jobs, sender, forced = drawn
    most = messages(sender, forced).max(axis=1) + slack
    relieved = relieve_together(holders, jobs, sender, forced, most.astype(np.int32), topology)
    check_senders(relieved, candidates_of(holders, jobs, topology))
    assert (messages(relieved, forced).max(axis=1) <= most).all()
    total, was = (messages(x, forced).sum(axis=0).max() for x in (relieved, sender))
    assert total <= was


@given(job_lists())
def test_relieve_together_comes_near_the_best_where_layers_allow_anything(drawn):
    topology, holders, jobs, sender, forced = drawn
    most = np.full(len(sender), 1000, dtype=np.int32)
    relieved = relieve_together(holders, jobs, sender, forced, most, topology)
    candidates = [ranks for layer in candidates_of(holders, jobs, topology) for ranks in layer]
    assert messages(relieved, forced).sum(axis=0).max() <= fewest(candidates, forced.sum(axis=0)) + 1
