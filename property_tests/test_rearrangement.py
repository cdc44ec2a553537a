"""Any history of starts, steps, failures, aborts and resumptions leaves whole layers and one placement on all ranks."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from eplb_core import Topology, plan_moves
from eplb_core.testing import placements
from eplb_torch import ExpertWeights, InProcessWorld, RearrangeError, Rearrangement
from eplb_torch.in_process import InProcessTransport
from tests.expert_rows import expert_layers, wrong_rows

TOPOLOGY = Topology(ep_size=3, slots_per_rank=3)
LOGICAL, LAYERS = 7, 3


class Failing(InProcessTransport):
    """Raises at the end of the exchange after `healthy` more, once: peers have their rows, and need not time out."""

    healthy = 10**9

    def exchange(self, sends, recvs, timeout):
        super().exchange(sends, recvs, timeout)
        self.healthy -= 1
        if self.healthy < 0:
            self.healthy = 10**9
            raise OSError("told to")


class Serving(RuleBasedStateMachine):
    """Three ranks in lock-step; every rule is one thing that may happen at a boundary.

    No rule has a precondition: whether a rearrangement is over depends on threads, and choices must not.
    """

    @initialize(data=st.data())
    def load(self, data):
        world = InProcessWorld(TOPOLOGY.ep_size)
        self.transports = [Failing(world, rank) for rank in range(world.size)]
        self.held = np.array(data.draw(placements(TOPOLOGY, LOGICAL, LAYERS)))
        self.old = self.new = self.held
        self.weights = [ExpertWeights(expert_layers(self.held, TOPOLOGY, rank)) for rank in range(world.size)]
        self.moving = []

    @rule(
        new=placements(TOPOLOGY, LOGICAL, LAYERS),
        rows=st.sampled_from([1, 4, 1000]),
        lead=st.sampled_from([0.0, 0.003]),
    )
    def start(self, new, rows, lead):
        if self.moving:
            return
        self.old, self.new = self.held, np.asarray(new)
        plan = plan_moves(self.old, self.new, TOPOLOGY)
        limit = rows * self.weights[0].row_bytes(0)
        self.moving = [
            Rearrangement(
                weights, plan, TOPOLOGY, transport, timeout=10.0, max_staging_bytes=limit, lead=lead, checksum=True
            )
            for weights, transport in zip(self.weights, self.transports, strict=True)
        ]

    @rule(steps=st.integers(1, 20))
    def serve(self, steps):
        for _ in range(steps):
            switched = set()
            for moving in self.moving:
                try:
                    layers = moving.step()
                except RearrangeError:
                    layers = ()
                switched.add(layers)
            assert len(switched) <= 1, switched
            time.sleep(0.001)
        self._look_whether_done()

    @rule(rank=st.integers(0, TOPOLOGY.ep_size - 1))
    def abort(self, rank):
        if self.moving:
            self.moving[rank].abort()

    @rule(rank=st.integers(0, TOPOLOGY.ep_size - 1), healthy=st.integers(0, 4))
    def fail_soon(self, rank, healthy):
        self.transports[rank].healthy = healthy

    @rule(how=st.sampled_from(["wait", "drain"]))
    def finish(self, how):
        if not self.moving:
            return

        def run(moving):
            try:
                getattr(moving, how)()
            except RearrangeError as error:
                return error.lost_ranks
            return ()

        with ThreadPoolExecutor(len(self.moving)) as pool:
            assert not any(pool.map(run, self.moving, timeout=30))
        self._look_whether_done()
        assert not self.moving

    def _look_whether_done(self):
        if self.moving and all(moving.done for moving in self.moving):
            self.held = self.moving[0].placement(self.old, self.new)
            self.moving = []

    @invariant()
    def every_rank_holds_whole_layers_of_one_placement(self):
        if not hasattr(self, "weights"):
            return
        placements = [moving.placement(self.old, self.new) for moving in self.moving] or [self.held] * 3
        for rank, placement in enumerate(placements):
            np.testing.assert_array_equal(placement, placements[0])
            assert wrong_rows(list(self.weights[rank].layers), placement, TOPOLOGY, rank) == []

    def teardown(self):
        if getattr(self, "moving", None):
            self.finish("wait")


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
