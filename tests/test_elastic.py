"""Changes of a group's size: worked examples, refusals, and the size of a real model."""

import re
from pathlib import Path

import numpy as np
import pytest

from eplb_core import EMPTY, EplbError, Topology, balancedness, rebalance, round_robin
from eplb_core.elastic import grow, lose_ranks, shrink
from eplb_core.elastic.lighten import lighten
from eplb_core.elastic.rehost import rehost


@pytest.fixture(scope="module")
def case():
    """Three ranks of two slots; experts 0 and 1 have two copies."""
    return np.asarray([[0, 1, 2, 0, 3, 1]], dtype=np.int32), np.asarray([[4, 4, 2, 2]]), Topology(3, 2)


def test_a_redundant_copy_makes_room_for_an_orphan(case):
    held, load, topology = case
    plan = lose_ranks(held, load, topology, [2])
    assert plan.placement.tolist() == [[3, 1, 2, 0]]
    assert plan.reload == ((0, 3),)
    assert plan.reload_slots().tolist() == [[0, 0, 3]]
    assert plan.problems() == ("No rank holds the (layer, expert) pairs [(0, 3)]: load them anew.",)


def test_too_few_slots_are_an_answer_and_not_an_error(case):
    held, load, topology = case
    plan = lose_ranks(held, load, topology, [1, 2])
    assert plan.placement.tolist() == [[0, 1]]
    assert plan.unhosted == ((0, 2), (0, 3))
    assert not plan.complete
    assert plan.min_slots_per_rank == 4
    assert plan.problems()[-1] == (
        "There is no slot for the (layer, expert) pairs [(0, 2), (0, 3)], which have the fewest tokens: "
        "use slots_per_rank >= 4, or more ranks."
    )
    assert lose_ranks(held, load, topology, [1, 2], slots_per_rank=4).complete


def test_a_hot_orphan_ousts_a_cold_survivor(case):
    held, _, topology = case
    plan = lose_ranks(held, np.asarray([[1, 9, 5, 9]]), topology, [1, 2])
    assert set(plan.placement[0].tolist()) == {1, 3}
    assert plan.placement[0, 1] == 1
    assert plan.unhosted == ((0, 0), (0, 2))


def test_256_experts_in_252_slots():
    """256 + 32 slots on 8 ranks, one of which dies: other balancers assert here."""
    topology = Topology.from_experts(256, 8, num_redundant=32)
    load = np.tile(np.arange(256), (2, 1))
    plan = lose_ranks(round_robin(2, 256, topology), load, topology, [3])
    assert plan.topology == Topology(7, 36)
    assert plan.unhosted == tuple((layer, expert) for layer in range(2) for expert in range(4))
    assert plan.min_slots_per_rank == 37
    assert (plan.placement != EMPTY).all()


def test_a_lost_node_leaves_the_others_as_nodes():
    topology = Topology(8, 3, num_nodes=4)
    held, load = round_robin(1, 12, topology), np.ones((1, 12), dtype=int)
    assert lose_ranks(held, load, topology, [2, 3]).topology == Topology(6, 3, num_nodes=3)
    assert lose_ranks(held, load, topology, [2, 4]).topology == Topology(6, 3)
    assert lose_ranks(held, load, topology, [0, 2, 4, 6]).topology == Topology(4, 3, num_nodes=4)


def test_leaving_ranks_send_first(case):
    held, load, topology = case
    plan = shrink(held, load, topology, [1])
    assert plan.group == topology
    assert plan.moves().source_slot.tolist() == [[0, 2, EMPTY, EMPTY, 4, 5]]
    assert plan.reload == ()


def test_moves_by_node_have_relays():
    topology, load = Topology(2, 2), np.asarray([[9, 9, 1, 1]])
    plan = grow(np.asarray([[0, 1, 2, 3]]), load, topology, Topology(4, 2, num_nodes=2))
    assert plan.moves().relay_slot is None
    assert plan.moves(fan_out="node").relay_slot is not None


def test_ids_are_32_bits_wide(case):
    held, load, topology = case
    larger = Topology(topology.ep_size + 1, topology.slots_per_rank)
    for plan in (lose_ranks(held, load, topology, [1]), grow(held, load, topology, larger)):
        arrays = plan.placement, plan.old, plan.new, plan.new_rank, plan.reload_slots()
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_nothing_changes_when_nobody_goes_or_joins(case):
    held, load, topology = case
    for plan in (lose_ranks(held, load, topology, []), shrink(held, load, topology, [])):
        assert (plan.placement.tolist(), plan.topology, plan.num_moves) == (held.tolist(), topology, 0)
    plan = grow(held, load, topology, topology, max_extra_moves=0)
    assert (plan.placement.tolist(), plan.num_moves) == (held.tolist(), 0)


def test_without_load_new_slots_are_filled_with_the_rarest_experts():
    plan = grow(np.asarray([[0, 1, 0, 2]]), np.zeros((1, 3), dtype=int), Topology(2, 2), Topology(3, 2))
    assert plan.placement.tolist() == [[0, 1, 0, 2, 1, 2]]


def test_without_load_an_orphan_replaces_the_expert_with_most_copies():
    held = np.asarray([[1, 2, 0, 1, 0, 2, 0, 3]])
    plan = lose_ranks(held, np.zeros((1, 4), dtype=int), Topology(4, 2), [3], max_extra_moves=0)
    assert plan.placement.tolist() == [[3, 2, 0, 1, 0, 2]]
    held = np.asarray([[1, 2, 0, 1, 0, 2, 0, 2, 3, 3]])
    plan = lose_ranks(held, np.zeros((1, 4), dtype=int), Topology(5, 2), [4], max_extra_moves=0)
    assert plan.placement.tolist() == [[1, 3, 0, 1, 0, 2, 0, 2]]


def test_orphans_are_exchanged_where_that_evens_out_the_ranks():
    """Expert 4, the heavier, took rank 0 first; exchanged with 3, the busiest is the same, the others more even."""
    kept, load = np.asarray([[0, 0], [0, 2], [1, 0]]), np.asarray([11.0, 8.0, 4.0, 6.0, 7.0])
    assert rehost(kept, load, np.zeros(3, dtype=bool)).tolist() == [[3, 0], [4, 2], [1, 0]]


def test_an_expert_that_returns_to_its_rank_returns_to_its_slot():
    """Extra moves bring expert 0 back where an orphan had taken its slot: no copy within the rank is left of that."""
    held, load = np.asarray([[3, 2, 2, 0, 1, 2, 1, 0]]), np.asarray([[4, 6, 9, 4]])
    plan = lose_ranks(held, load, Topology(4, 2), [0], max_extra_moves=2, tolerance=0.0)
    assert plan.placement.tolist() == [[3, 0, 1, 2, 1, 2]]


def test_a_new_slot_stays_free_if_it_would_make_the_new_rank_the_busiest():
    plan = grow(np.asarray([[0, 1, 2]]), np.asarray([[10, 10, 10]]), Topology(3, 1), Topology(4, 3))
    assert plan.placement.tolist() == [[0, -1, -1, 1, -1, -1, 2, -1, -1, -1, 0, 1]]


def test_no_copy_is_made_that_would_burden_its_rank_more_than_the_busiest_is():
    held, load = np.asarray([[[0, 1], [2, EMPTY]]]), np.asarray([[10.0, 0.0, 9.0]])
    assert lighten(held, held, load, max_moves=9, tolerance=0.0).tolist() == held.tolist()
    lighter = lighten(held, held, np.asarray([[10.0, 0.0, 4.0]]), max_moves=9, tolerance=0.0)
    assert lighter.tolist() == [[[0, 1], [2, 0]]]


def test_a_received_copy_makes_room_for_another_at_no_cost():
    """Expert 1 need not be received by rank 1 if expert 0 is; as a second copy it must be all the same."""
    load = np.asarray([[10.0, 2.0, 1.0]])
    home = np.asarray([[[0, 1], [2, EMPTY]]])
    placed = lighten(np.asarray([[[0, 1], [2, 1]]]), home, load, max_moves=0, tolerance=0.0)
    assert placed.tolist() == [[[0, 1], [2, 0]]]
    held, home = np.asarray([[[0, 2], [1, 1]]]), np.asarray([[[0, 2], [EMPTY, EMPTY]]])
    assert lighten(held, home, load, max_moves=0, tolerance=0.0).tolist() == held.tolist()
    assert lighten(held, home, load, max_moves=1, tolerance=0.0).tolist() == [[[0, 2], [0, 1]]]


def test_a_rank_that_comes_back_takes_its_place(case):
    held, load, topology = case
    lost = lose_ranks(held, load, topology, [1])
    plan = grow(lost.placement, load, lost.topology, topology, joining_ranks=[1])
    assert plan.new_rank.tolist() == [0, 2]
    assert plan.old.tolist() == [[0, 2, EMPTY, EMPTY, 3, 1]]
    assert (plan.placement != EMPTY).all()


@pytest.mark.parametrize("policy", ["greedy", "incremental"])
def test_moves_after_losing_one_of_32_ranks(policy):
    """At most 1.1 per expert that has lost its last copy; such an expert must be received."""
    rng = np.random.default_rng(0)
    load = rng.poisson(np.exp(rng.normal(size=(6, 256))) * 4000)
    topology = Topology.from_experts(256, 32, num_redundant=32)
    held = rebalance(load, topology, policy=policy)
    plan = lose_ranks(held, load, topology, [7])
    by_rank = held.reshape(6, 32, 9)
    kept = np.delete(by_rank, 7, axis=1).reshape(6, -1)
    orphans = sum(256 - len(set(row.tolist())) for row in kept)
    assert len(plan.reload) == orphans
    assert orphans <= plan.num_moves <= 1.1 * orphans
    assert balancedness(plan.placement, load, plan.topology).mean() > 0.85


def test_new_ranks_are_used():
    """A rank more takes its part of the load, at one transfer per slot."""
    rng = np.random.default_rng(1)
    load = rng.poisson(np.exp(rng.normal(size=(4, 64))) * 4000)
    topology = Topology(8, 9)
    held = rebalance(load, topology)
    plan = grow(held, load, topology, Topology(10, 9), max_extra_moves=0)
    assert plan.num_moves <= 4 * 2 * 9
    assert balancedness(plan.placement, load, plan.topology).mean() > 0.95


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda h, w, t: lose_ranks(h, w, t, [3]), r"dead_ranks=.*0\.\.2; got dead_ranks=\[3\]"),
        (lambda h, w, t: lose_ranks(h, w, t, [-1]), r"\[-1\]"),
        (lambda h, w, t: lose_ranks(h, w, t, [1, 1]), r"ranks \[1\] twice"),
        (lambda h, w, t: lose_ranks(h, w, t, [0, 1, 2]), "must leave a rank"),
        (lambda h, w, t: shrink(h, w, t, [0, 1, 2]), r"shrink\(leaving_ranks=...\)` must leave a rank"),
        (lambda h, w, t: lose_ranks(h, w, t, [1.0]), "different ranks"),
        (lambda h, w, t: lose_ranks(h, w, t, [True, False, False]), "different ranks"),
        (lambda h, w, t: lose_ranks(h, w, t, [1], slots_per_rank=1), "slots_per_rank=1, present=2"),
        (lambda h, w, t: lose_ranks(h, w, t, [1], max_extra_moves=-1), "max_extra_moves=-1"),
        (lambda h, w, t: lose_ranks(h, w, t, [1], tolerance=-0.1), r"tolerance=-0\.1"),
        (lambda h, w, t: lose_ranks(h, w, t, [1], tolerance=float("inf")), "tolerance=inf"),
        (lambda h, w, t: lose_ranks(h, -w, t, [1]), "must be >= 0"),
        (lambda h, w, t: lose_ranks(h[:, :4], w, t, [1]), "6 slots"),
        (lambda h, w, t: lose_ranks(h, w[:, :3], t, [1]), "num_logical=3 holds ids"),
        (lambda h, w, t: lose_ranks(h, np.tile(w, (2, 1)), t, [1]), "layers 2 and 1"),
        (lambda h, w, t: grow(h, w, t, Topology(2, 2)), "Use `shrink`"),
        (lambda h, w, t: grow(h, w, t, Topology(4, 1)), "Use `shrink`"),
        (lambda h, w, t: grow(h, w, t, Topology(5, 2), joining_ranks=[3]), "1 ranks, while 5 - 3 join"),
        (lambda h, w, t: grow(h, w, t, Topology(4, 2), joining_ranks=[4]), r"joining_ranks=...\)` must be different"),
    ],
)
def test_requests_that_cannot_be_met(case, call, complaint):
    with pytest.raises(EplbError, match=complaint):
        call(*case)


def test_the_example_in_the_docs_prints_what_they_say(capsys):
    text = (Path(__file__).parents[1] / "docs" / "elastic.md").read_text(encoding="utf-8")
    ((code, output),) = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == output
