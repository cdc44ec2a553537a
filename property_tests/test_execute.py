"""The executor, on threads, does what the plan means: for every pair of placements, fan-out and memory limit."""

from hypothesis import given
from hypothesis import strategies as st

from eplb_core import plan_moves
from eplb_core.testing import placement_pairs
from eplb_torch import ExpertWeights, InProcessWorld, RearrangeError, rearrange
from eplb_torch.in_process import InProcessTransport
from eplb_torch.transaction.local import order_copies
from tests.expert_rows import expert_layers, wrong_rows


@given(
    st.one_of(placement_pairs(empty=True), placement_pairs(similar=True)),
    st.sampled_from(["direct", "node"]),
    st.sampled_from([1, 1000, 2**30]),
)
def test_every_slot_holds_its_expert(pair, fan_out, max_staging_bytes):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology, fan_out=fan_out)

    def run(transport):
        weights = ExpertWeights(expert_layers(old, topology, transport.rank))
        rearrange(weights, plan, topology, transport, timeout=10, max_staging_bytes=max_staging_bytes)
        return wrong_rows(list(weights.layers), new, topology, transport.rank)

    assert InProcessWorld(topology.ep_size).run(run) == [[]] * topology.ep_size


class DyingTransport(InProcessTransport):
    """Raises at the `fatal`-th call."""

    def __init__(self, world, rank, fatal):
        super().__init__(world, rank)
        self.calls_left = fatal

    def _check_alive(self):
        self.calls_left -= 1
        if self.calls_left < 0:
            self.world.kill(self.rank)
        super()._check_alive()


@given(st.data(), placement_pairs(max_ranks_per_node=2, max_nodes=2))
def test_a_rank_that_dies_leaves_every_layer_old_or_new(data, pair):
    topology, _, old, new = pair
    plan = plan_moves(old, new, topology)
    victim = data.draw(st.integers(0, topology.ep_size - 1))
    fatal = data.draw(st.integers(0, 6))

    def run(transport):
        if transport.rank == victim:
            transport = DyingTransport(transport.world, victim, fatal)
        weights = ExpertWeights(expert_layers(old, topology, transport.rank))
        try:
            report = rearrange(weights, plan, topology, transport, timeout=0.5, max_staging_bytes=1)
            committed, left, now = report.committed_layers, (), new
        except RearrangeError as error:
            committed, left, now = error.committed_layers, error.uncommitted_layers, error.placement(old, new)
        assert sorted(committed + left) == list(range(len(old)))
        return now.tolist(), wrong_rows(list(weights.layers), now, topology, transport.rank)

    results = InProcessWorld(topology.ep_size).run(run)
    assert [wrong for _, wrong in results] == [[]] * topology.ep_size
    survivors = [placement for rank, (placement, _) in enumerate(results) if rank != victim]
    assert all(placement == survivors[0] for placement in survivors)


@given(st.data(), st.integers(1, 8))
def test_copies_are_ordered_so_that_nothing_is_read_after_it_was_overwritten(data, num_slots):
    slots = st.integers(0, num_slots - 1)
    sources = {dst: src for dst, src in data.draw(st.dictionaries(slots, slots)).items() if dst != src}
    held, spare, saved = list(range(num_slots)), None, 0
    for copy in order_copies(sources):
        if copy.saves:
            spare, saved = held[copy.src], saved + 1
        elif copy.restores:
            held[copy.dst] = spare
        else:
            held[copy.dst] = held[copy.src]
    assert held == [sources.get(slot, slot) for slot in range(num_slots)]
    assert len(order_copies(sources)) == len(sources) + saved
