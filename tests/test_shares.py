import numpy as np
import pytest

from eplb_core import EMPTY, EplbError, Topology, derive_maps, rebalance
from eplb_core.shares import balanced_shares, check_shares, even_shares, slot_load
from eplb_core.shares.locality import local_shares
from eplb_core.shares.split import split_load
from eplb_core.shares.turns import derive_turns

PLACEMENT = np.asarray([[0, 1, 0, 2]])
TOPOLOGY = Topology(ep_size=2, slots_per_rank=2)


def test_load_passes_along_a_chain_of_ranks():
    # Expert i has copies on ranks i and i + 1 only, and rank 0 all other load: it must pass through every rank.
    num_ranks = 40
    placement = np.asarray([[e for rank in range(num_ranks) for e in (max(rank - 1, 0), min(rank, num_ranks - 2))]])
    load = np.asarray([[4000] + [100] * (num_ranks - 2)])
    tokens = split_load(placement, load, Topology(num_ranks, 2)).reshape(num_ranks, 2).sum(axis=1)
    assert tokens[:2].tolist() == pytest.approx([2000, 2000])
    np.testing.assert_allclose(tokens[2:], 3800 / 38, rtol=1e-9)


def test_levels_below_the_busiest_are_level_too():
    # Ranks 0 and 1 hold a hot expert each that nobody shares; ranks 2 to 4 share expert 2.
    placement = np.asarray([[0, EMPTY, 1, EMPTY, 2, 3, 2, 4, 2, 5]])
    load = np.asarray([[90, 70, 12, 6, 2, 1]])
    tokens = split_load(placement, load, Topology(5, 2)).reshape(5, 2).sum(axis=1)
    np.testing.assert_allclose(tokens, [90, 70, 7, 7, 7])


def test_shares_follow_the_load_where_even_ones_cannot():
    load = np.asarray([[80, 10, 30]])
    even, balanced = even_shares(PLACEMENT), balanced_shares(PLACEMENT, load, TOPOLOGY)
    assert slot_load(PLACEMENT, load, even).tolist() == [[40, 10, 40, 30]]
    assert slot_load(PLACEMENT, load, balanced).tolist() == [[50, 10, 30, 30]]


def test_a_layer_that_cannot_gain_keeps_even_shares():
    load = np.asarray([[80, 30, 30], [80, 10, 30], [0, 0, 0]])
    shares = balanced_shares(np.tile(PLACEMENT, (3, 1)), load, TOPOLOGY)
    assert shares.tolist() == [[1, 1, 1, 1], [5, 1, 3, 1], [1, 1, 1, 1]]


def test_a_coarse_resolution_that_would_do_harm_is_not_used():
    # 11 of 20 is best; of two parts the nearest are 1 and 1, of three 2 and 1, which is worse than even.
    load = np.asarray([[20, 4, 6]])
    assert balanced_shares(PLACEMENT, load, TOPOLOGY, resolution=3).tolist() == [[1, 1, 1, 1]]
    assert balanced_shares(PLACEMENT, load, TOPOLOGY, resolution=20).tolist() == [[11, 1, 9, 1]]


def test_the_smallest_exact_sum_is_used_and_the_largest_remainders_else():
    placement, topology = np.asarray([[0, 1, 0, 2, 0, 3]]), Topology(3, 2)
    assert balanced_shares(placement, np.asarray([[90, 10, 40, 70]]), topology).tolist() == [[2, 1, 1, 1, 0, 1]]
    # 60.5, 30.5 and 0 of 91 tokens are 42.55, 21.45 and 0 of 64.
    shares = balanced_shares(placement, np.asarray([[91, 10, 40, 71]]), topology)
    assert shares[0, [0, 2, 4]].sum() == 64
    assert shares[0, [0, 2, 4]].tolist() == [43, 21, 0]


def test_nearest_copies_alone_lose_the_balance_that_local_shares_keep():
    # Two copies on node 0 (ranks 0, 1), one on node 1 (ranks 2, 3): the collapse of a replica list to its nearest.
    placement, topology = np.asarray([[0, 0, 0, 1]]), Topology(4, 1, num_nodes=2)

    def received(slack):
        own = [local_shares(placement, topology, rank, 2, slack=slack) for rank in range(4)]
        return sum(slot_load(placement, np.asarray([[30, 0]]), shares) for shares in own)[0, :3].tolist()

    assert received(slack=0) == pytest.approx([40, 40, 40])
    assert received(slack=64) == pytest.approx([30, 30, 60])
    assert received(slack=0.25) == pytest.approx([35, 35, 50], abs=1)


def test_local_shares_can_meet_balanced_ones():
    placement, topology = np.asarray([[0, 1, 0, 2]]), Topology(2, 2)
    shares = np.asarray([[5, 1, 3, 1]])
    first, second = (local_shares(placement, topology, rank, 3, shares=shares) for rank in range(2))
    assert first.tolist() == [[1, 1, 0, 1]]
    assert second.tolist() == [[1, 1, 3, 1]]


def test_turns_are_interleaved():
    maps = derive_turns(np.asarray([[0, 1, 0, 0]]), np.asarray([[4, 7, 2, 2]]), num_logical=2)
    assert maps.logical_to_physical[0, 0].tolist() == [0, 2, 0, 3, 0, 2, 0, 3]
    assert maps.replica_count.tolist() == [[8, 7]]


def test_shares_raise_the_balance_when_the_load_has_drifted_from_the_placement():
    topology = Topology.from_experts(256, 32, num_redundant=32, num_nodes=4)
    rng = np.random.default_rng(0)
    load = rng.lognormal(sigma=1.0, size=(5, 256)) * 1000
    placement = rebalance(load, topology, policy="greedy")
    drifted = load * rng.lognormal(sigma=0.4, size=load.shape)

    def busiest(shares):
        return slot_load(placement, drifted, shares).reshape(5, 32, 9).sum(axis=2).max(axis=1).sum()

    assert busiest(balanced_shares(placement, drifted, topology)) < 0.95 * busiest(even_shares(placement))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([[1, 1, 1]], r"shape=\(1, 3\)"),
        ([[1.0, 1.0, 1.0, 1.0]], "float64"),
        ([[1, -1, 1, 1]], r"\[\(0, 1\)\]"),
        ([[1, 0, 1, 1]], r"\(layer, expert\) \[\(0, 1\)\]"),
        ([[0, 1, 0, 1]], r"\(layer, expert\) \[\(0, 0\)\]"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares, message):
    for refuse in (
        lambda x: check_shares(PLACEMENT, x, 3),
        lambda x: derive_turns(PLACEMENT, x, 3),
        lambda x: slot_load(PLACEMENT, np.ones((1, 3)), x),
        lambda x: local_shares(PLACEMENT, TOPOLOGY, 0, 3, shares=x),
    ):
        with pytest.raises(EplbError, match=message):
            refuse(np.asarray(shares))


def test_shares_in_empty_slots_are_refused():
    with pytest.raises(EplbError, match=r"EMPTY slots; got others at \(layer, slot\) \[\(0, 1\)\]"):
        check_shares(np.asarray([[0, EMPTY]]), np.asarray([[1, 1]]), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balanced_shares(PLACEMENT, np.ones((2, 3)), TOPOLOGY), "placement's layers"),
        (lambda: balanced_shares(PLACEMENT, np.ones((1, 2)), TOPOLOGY), "num_logical=2"),
        (lambda: balanced_shares(PLACEMENT, -np.ones((1, 3)), TOPOLOGY), "negative"),
        (lambda: balanced_shares(PLACEMENT, np.ones((1, 3)), TOPOLOGY, resolution=1), "most copies=2"),
        (lambda: split_load(PLACEMENT, np.ones((1, 3)), Topology(3, 2)), "6 slots"),
        (lambda: local_shares(PLACEMENT, TOPOLOGY, 2, 3), "ep_rank=2"),
        (lambda: local_shares(PLACEMENT, TOPOLOGY, 0, 2), "num_logical=2"),
        (lambda: local_shares(PLACEMENT, TOPOLOGY, 0, 3, slack=-0.1), "slack=-0.1"),
        (lambda: local_shares(PLACEMENT, TOPOLOGY, 0, 3, slack=float("inf")), "slack=resolution"),
        (lambda: derive_turns(PLACEMENT, np.asarray([[3, 1, 4, 1]]), 3, max_turns=6), "Use 7 or more"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(call, message):
    with pytest.raises(EplbError, match=message):
        call()


def test_an_even_placement_needs_no_wider_maps():
    turns, maps = derive_turns(PLACEMENT, even_shares(PLACEMENT), 3), derive_maps(PLACEMENT, 3)
    assert turns.logical_to_physical.shape == maps.logical_to_physical.shape
