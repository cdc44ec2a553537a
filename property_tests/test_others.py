"""Our own policies, executor and dispatch pass the checks that others are given, and the cases are valid."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core import EMPTY, check_placement, derive_maps, plan_moves, rebalance
from eplb_core.testing import (
    check_dispatch,
    check_executor,
    check_policy,
    dispatch_cases,
    move_cases,
    policy_cases,
)
from eplb_torch import ExpertWeights, InProcessWorld, RearrangeError, rearrange
from eplb_torch.dispatch import LayerMaps, select_slots

CLAIMS = {
    "greedy": {"fair_copies": True, "keeps_slots": True},
    "refined": {"distinct": True, "keeps_slots": True, "allow_empty": True},
    "incremental": {"keeps_slots": True, "allow_empty": True},
}


@pytest.mark.parametrize("policy", CLAIMS)
@given(policy_cases())
def test_our_policies_keep_what_they_claim(policy, case):
    placed = check_policy(partial(rebalance, policy=policy), case, **CLAIMS[policy])
    check_placement(placed, case.topology, case.load.shape[1])


@given(policy_cases(previous=True), st.integers(0, 6))
def test_limits_of_moves_are_kept(case, limit):
    for option in ("max_moves", "max_total_moves"):
        limited = {option: limit}
        check_policy(partial(rebalance, **limited), case, allow_empty=True, **limited)


class Broken(Exception):
    """A transport that was told to break."""


class BreakingTransport:
    """Hands on to a transport, and breaks at the end of the exchange after `healthy` more."""

    def __init__(self, transport, healthy):
        self._transport, self._healthy = transport, healthy

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def exchange(self, sends, recvs, timeout):
        self._transport.exchange(sends, recvs, timeout)
        self._healthy -= 1
        if self._healthy < 0:
            raise Broken


def carry_out(old, new, topology, rows, *, breaks=None, max_staging_bytes=2**30):
    """Run `rearrange` on a thread per rank, each with its part of the rows; a rank's transport may break."""
    plan = plan_moves(old, new, topology)
    depth = topology.slots_per_rank

    def run(transport):
        mine = torch.from_numpy(rows[:, transport.rank * depth : (transport.rank + 1) * depth])
        if breaks is not None and transport.rank == breaks[0]:
            transport = BreakingTransport(transport, breaks[1])
        weights = ExpertWeights([{"row": layer} for layer in mine])
        try:
            rearrange(weights, plan, topology, transport, timeout=10, max_staging_bytes=max_staging_bytes)
        except RearrangeError as error:
            return error
        return None

    errors = [error for error in InProcessWorld(topology.ep_size).run(run) if error is not None]
    if errors:
        assert len(errors) == topology.ep_size
        assert len({error.committed_layers for error in errors}) == 1
        raise errors[0]


@given(move_cases(empty=True))
def test_our_executor_passes(case):
    check_executor(carry_out, case)


@given(move_cases(max_ranks_per_node=3, max_nodes=1), st.tuples(st.integers(0, 2), st.integers(0, 6)))
@settings(max_examples=30)
def test_our_executor_says_which_layers_are_new_when_it_fails(case, breaks):
    """With a layer per group of layers, so that failures come between them."""
    layer_bytes = case.rows[0].nbytes
    execute = partial(carry_out, breaks=breaks, max_staging_bytes=layer_bytes)
    check_executor(execute, case, failures=RearrangeError, committed=lambda error: error.committed_layers)


@given(dispatch_cases(), st.integers(0, 50))
def test_our_dispatch_takes_turns(case, offset):
    def dispatch(topk_ids, maps):
        layer = LayerMaps(torch.from_numpy(maps.logical_to_physical), torch.from_numpy(maps.replica_count))
        return select_slots(torch.from_numpy(topk_ids), layer, offset=offset).numpy()

    check_dispatch(dispatch, case, max_spread=1)


def read_only_leaves(case):
    return [x for field in case for x in (field if isinstance(field, tuple) else [field]) if isinstance(x, np.ndarray)]


@given(policy_cases(), policy_cases(previous=True), policy_cases(previous=False))
def test_policy_cases_are_valid(any_case, with_previous, without):
    assert with_previous.previous is not None
    assert without.previous is None
    for load, topology, previous in (any_case, with_previous):
        assert load.dtype == np.int64
        assert load.shape[1] <= topology.num_slots
        if previous is not None:
            assert len(previous) == len(load)
            check_placement(previous, topology, load.shape[1])
    assert not any(x.flags.writeable for x in read_only_leaves(with_previous))


@given(move_cases(width=2), move_cases(empty=True))
def test_move_cases_have_distinct_rows(full, holed):
    for case in (full, holed):
        check_placement(case.old, case.topology)
        assert case.new.shape == case.old.shape == case.rows.shape[:2]
        for layer in case.rows:
            assert len({row.tobytes() for row in layer}) == case.topology.num_slots
        assert not any(x.flags.writeable for x in read_only_leaves(case))
    assert full.rows.shape[2] == 2
    check_placement(full.new, full.topology, int(full.old.max()) + 1)


@given(dispatch_cases(max_tokens=5, max_k=2), dispatch_cases(padding=False))
def test_dispatch_cases_are_valid(small, dense):
    assert small.topk_ids.shape[0] <= 5
    assert 1 <= small.topk_ids.shape[1] <= 2
    assert (dense.topk_ids >= 0).all()
    for ids, maps in (small, dense):
        num_logical, width = maps.logical_to_physical.shape
        assert ((ids >= EMPTY) & (ids < num_logical)).all()
        expected = derive_maps(maps.physical_to_logical, num_logical, max_replicas=width)
        assert all(np.array_equal(a, b) for a, b in zip(maps, expected, strict=True))
        assert (maps.replica_count >= 1).all()
    assert not any(x.flags.writeable for x in read_only_leaves(small))
