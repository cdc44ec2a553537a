"""Messages shifted for all layers together: NumPy counts only what a shift changes, and chooses as the general form."""

import array_api_strict
import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from eplb_core import Topology, _ops
from eplb_core.moves.candidates import Jobs
from eplb_core.moves.relief import relieve_together
from property_tests.test_senders import job_lists, messages


def skewed(num_layers=6, num_experts=12, ep_size=8, seed=0):
    """Jobs whose senders all chose the lowest candidate, so that many shifts are needed."""
    rng = np.random.default_rng(seed)
    topology = Topology(ep_size, 6)
    held = rng.integers(0, num_experts, (num_layers, topology.num_slots))
    order = np.argsort(held, axis=1, kind="stable")
    counts = _ops.count_ids(held, num_experts)
    stop = np.cumsum(counts.ravel()).reshape(counts.shape)
    jobs = Jobs(np.repeat(stop - counts, 3, axis=1), np.repeat(stop, 3, axis=1))
    holders = order.ravel().astype(np.int32)
    lowest = holders[np.minimum(jobs.start, holders.size - 1)] // topology.slots_per_rank
    sender = np.where(jobs.stop > jobs.start, lowest, -1).astype(np.int32)
    return topology, holders, jobs, sender, np.zeros((num_layers, ep_size), dtype=np.int32)


def check(drawn, slack):
    topology, holders, jobs, sender, forced = drawn
    most = (messages(sender, forced).max(axis=1) + slack).astype(np.int32)
    arrays = (holders, *jobs, sender, forced, most)
    strict = [array_api_strict.asarray(np.array(x)) for x in arrays]
    general = relieve_together(strict[0], Jobs(*strict[1:3]), *strict[3:], topology)
    relieved = relieve_together(holders, jobs, sender, forced, most, topology)
    np.testing.assert_array_equal(relieved, np.asarray(general))
    return relieved


@given(job_lists(), st.integers(0, 2))
def test_numpy_shifts_the_messages_that_the_general_form_shifts(drawn, slack):
    check(drawn, slack)


@example(seed=0, num_layers=6, slack=0)
@given(seed=st.integers(0, 1000), num_layers=st.integers(1, 9), slack=st.integers(0, 3))
def test_it_does_so_over_many_shifts(seed, num_layers, slack):
    drawn = skewed(num_layers=num_layers, seed=seed)
    sender = drawn[3]
    changed = check(drawn, slack) != sender
    assume(changed.sum() > 3)


def test_a_rank_that_nobody_can_relieve_keeps_its_messages():
    topology = Topology(2, 3)
    sender, forced = np.ones((1, 5), dtype=np.int32), np.zeros((1, 2), dtype=np.int32)
    jobs = Jobs(np.full((1, 5), 3), np.full((1, 5), 6))
    holders = np.arange(6, dtype=np.int32)
    assert (check((topology, holders, jobs, sender, forced), 0) == 1).all()
