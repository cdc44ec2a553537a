"""A group that loses ranks, shrinks, grows, rebalances and reloads, in any order, against a dictionary of its ranks.

The model knows processes by name, as their numbers change, and what is in each of their slots. It moves rows by the
plans it is given, and reloads late, or only in part.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eplb_core import EMPTY, Topology, plan_moves, rebalance, round_robin
from eplb_core.elastic import grow, lose_ranks, shrink
from eplb_core.elastic.survive import survivable

LAYERS, MOST_RANKS, MOST_SLOTS = 2, 6, 4
EXTRA = st.sampled_from([0, 0, 1, 3])


class Changing(RuleBasedStateMachine):
    """`self.rows[name][layer][local]` is the expert whose weights are there; `self.late` what is still to be loaded."""

    @initialize(nodes=st.integers(1, 2), per_node=st.integers(1, 3), depth=st.integers(2, 3), spare=st.integers(0, 9))
    def start(self, nodes, per_node, depth, spare):
        self.topology = Topology(nodes * per_node, depth, nodes)
        self.experts = range(max(1, self.topology.num_slots - spare))
        self.load = np.ones((LAYERS, len(self.experts)), dtype=np.int64)
        self.names = list(range(self.topology.ep_size))
        self.newest = self.topology.ep_size
        self.rows = self._by_name(round_robin(LAYERS, len(self.experts), self.topology), self.names)
        self.late = {}
        self.unhosted = set()

    def _by_name(self, placement, names):
        """What each rank of a group holds under a placement, in lists."""
        parts = np.asarray(placement).reshape(LAYERS, len(names), -1)
        return {name: parts[:, rank].tolist() for rank, name in enumerate(names)}

    def _held(self, names=None):
        names = self.names if names is None else names
        held = [[e for name in names for e in self.rows[name][layer]] for layer in range(LAYERS)]
        placement = np.asarray(held, dtype=np.int32)
        placement.setflags(write=False)
        return placement

    def _lost(self, names):
        """The (layer, expert) that none of these hold."""
        held = [{e for name in names for e in self.rows[name][layer]} for layer in range(LAYERS)]
        return {(layer, e) for layer in range(LAYERS) for e in self.experts if e not in held[layer]}

    @rule(data=st.data())
    def serve(self, data):
        tokens = st.lists(st.integers(0, 20), min_size=len(self.experts), max_size=len(self.experts))
        self.load = np.asarray(data.draw(st.lists(tokens, min_size=LAYERS, max_size=LAYERS)))
        self.load.setflags(write=False)

    @precondition(lambda self: self.topology.ep_size > 1)
    @rule(data=st.data(), extra=EXTRA, more=st.integers(0, 1), leave=st.sampled_from([lose_ranks, shrink]))
    def ranks_go(self, data, extra, more, leave):
        ranks = st.integers(0, self.topology.ep_size - 1)
        gone = data.draw(st.lists(ranks, unique=True, min_size=1, max_size=self.topology.ep_size - 1))
        self._go(leave, gone, extra, min(self.topology.slots_per_rank + more, MOST_SLOTS))

    @precondition(lambda self: self.topology.num_nodes > 1)
    @rule(data=st.data())
    def a_node_is_lost(self, data):
        node, size = data.draw(st.integers(0, self.topology.num_nodes - 1)), self.topology.ranks_per_node
        self._go(lose_ranks, list(range(node * size, (node + 1) * size)), 0, self.topology.slots_per_rank)

    def _go(self, leave, gone, extra, depth):
        limits = {"max_extra_moves": extra, "tolerance": 0.0, "slots_per_rank": depth}
        plan = leave(self._held(), self.load, self.topology, gone, **limits)
        stay = [name for rank, name in enumerate(self.names) if rank not in gone]
        order = [self.names.index(name) for name in stay]
        assert [order[new] for new in plan.new_rank if new != EMPTY] == order
        assert plan.topology.slots_per_rank == depth
        orphans = self._lost(stay)
        received = self._carry_out(plan, stay if leave is lose_ranks else self.names, stay, extra)
        assert received <= len(orphans - set(plan.unhosted)) + extra

    @precondition(lambda self: self.topology.ep_size < MOST_RANKS)
    @rule(data=st.data(), joining=st.integers(0, 2), more=st.integers(0, 1), extra=EXTRA, keep_nodes=st.booleans())
    def ranks_join(self, data, joining, more, extra, keep_nodes):
        size, depth = self.topology.ep_size + joining, min(self.topology.slots_per_rank + more, MOST_SLOTS)
        nodes = self.topology.num_nodes if keep_nodes and size % self.topology.num_nodes == 0 else 1
        after = Topology(size, depth, nodes)
        places = data.draw(st.permutations(range(size)))[:joining]
        limits = {"max_extra_moves": extra, "tolerance": 0.0}
        plan = grow(self._held(), self.load, self.topology, after, joining_ranks=places, **limits)
        assert plan.topology == after
        there = iter(self.names)
        names = [self._newcomer(depth) if rank in places else next(there) for rank in range(size)]
        assert [names[new] for new in plan.new_rank] == self.names
        orphans = self._lost(self.names)
        received = self._carry_out(plan, names, names, extra)
        assert received <= len(orphans - set(plan.unhosted)) + joining * depth * LAYERS + extra

    def _newcomer(self, depth):
        self.newest += 1
        self.rows[self.newest] = [[EMPTY] * depth for _ in range(LAYERS)]
        return self.newest

    def _planned(self, name):
        """What a rank is to hold, once all is loaded."""
        rows = [list(row) for row in self.rows[name]]
        for (who, layer, local), expert in self.late.items():
            if who == name:
                rows[layer][local] = expert
        return rows

    def _carry_out(self, plan, group, stay, extra):
        """Move rows among the ranks of `group`, of which `stay` are left. The number of (rank, expert) received."""
        depth = plan.group.slots_per_rank
        for name in group:
            self.rows[name] = [row + [EMPTY] * (depth - len(row)) for row in self.rows[name]]
        before = {name: [list(row) for row in self.rows[name]] for name in stay}
        assert plan.old.tolist() == self._held(group).tolist()
        wanted = self._by_name(plan.placement, stay)
        assert self._by_name(plan.new, group) == {
            name: wanted.get(name, [[EMPTY] * depth for _ in range(LAYERS)]) for name in group
        }
        lost = self._lost(group)
        assert set(plan.reload) == lost - set(plan.unhosted)
        self._move(plan.moves().source_slot, group)
        self.names, self.topology, self.unhosted = list(stay), plan.topology, set(plan.unhosted)
        self._load_late(wanted)
        self._check_slots(before, wanted, extra)
        received = 0
        for name in stay:
            for old, new in zip(before[name], wanted[name], strict=True):
                received += len(set(new) - set(old) - {EMPTY})
        assert received == plan.num_moves
        return received

    def _move(self, source_slot, group):
        """Copy rows between the slots of a group as a plan says; ranks outside the group are gone."""
        held = self._held(group).tolist()
        rows = [[EMPTY if src == EMPTY else held[layer][src] for src in row] for layer, row in enumerate(source_slot)]
        self.rows = self._by_name(rows, group)

    def _load_late(self, wanted):
        """What moves have not brought must be loaded; nothing else may be missing or wrong."""
        self.rows = {name: self.rows[name] for name in self.names}
        self.late = {}
        for name in self.names:
            for layer, (held, row) in enumerate(zip(self.rows[name], wanted[name], strict=True)):
                for local, (have, expert) in enumerate(zip(held, row, strict=True)):
                    if have == EMPTY and expert != EMPTY:
                        self.late[name, layer, local] = expert
                    else:
                        assert have == expert

    def _check_slots(self, before, wanted, extra):
        """No copy that survived is dropped or moved without need."""
        for layer in range(LAYERS):
            old, new = ([e for name in self.names for e in rows[name][layer]] for rows in (before, wanted))
            unhosted = {e for lay, e in self.unhosted if lay == layer}
            dropped = [a for a, b in zip(old, new, strict=True) if a not in (EMPTY, b)]
            assert set(dropped) <= set(new) | unhosted
            orphans = set(self.experts) - set(old) - unhosted
            if extra == 0:
                free = sum(e == EMPTY or e in unhosted for e in old)
                assert sum(e not in unhosted for e in dropped) == max(0, len(orphans) - free)
            for name in self.names:
                had, has = before[name][layer], wanted[name][layer]
                moved = [e for e, there in zip(had, has, strict=True) if e not in (EMPTY, there) and e in has]
                assert all(had.count(expert) > 1 for expert in moved)

    @precondition(lambda self: len(self.experts) <= self.topology.num_slots)
    @rule(
        policy=st.sampled_from(["greedy", "refined", "incremental", "incremental"]),
        max_moves=st.none() | st.integers(0, 2),
        spread=st.booleans(),
    )
    def rebalance_the_group(self, policy, max_moves, spread):
        limit = max_moves if policy == "incremental" else None
        spread = "node" if spread and self.topology.num_nodes > 1 else None
        held, lost = self._held(), self._lost(self.names)
        new = rebalance(self.load, self.topology, policy=policy, previous=held, max_moves=limit, spread=spread)
        moves = plan_moves(held, new, self.topology, allow_lost=True)
        wanted = self._by_name(new, self.names)
        if limit is not None:
            for layer in range(LAYERS):
                moved = sum(len(set(wanted[n][layer]) - set(self.rows[n][layer]) - {EMPTY}) for n in self.names)
                assert moved <= limit + sum(lay == layer for lay, _ in lost)
        elif spread:
            self._check_spread(new)
        self._move(moves.source_slot, self.names)
        self.unhosted = set()
        self._load_late(wanted)
        assert {(layer, expert) for (_, layer, _), expert in self.late.items()} == lost

    def _check_spread(self, placement):
        for row in placement.tolist():
            for expert in self.experts:
                slots = [slot for slot, e in enumerate(row) if e == expert]
                assert len(slots) == 1 or len({slot // self.topology.slots_per_node for slot in slots}) > 1

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def load_some(self, data):
        slots = sorted(self.late)
        for slot in data.draw(st.lists(st.sampled_from(slots), unique=True, min_size=1)):
            name, layer, local = slot
            self.rows[name][layer][local] = self.late.pop(slot)

    @invariant()
    def every_expert_is_hosted_or_named(self):
        if not hasattr(self, "rows"):
            return
        assert len(self.names) == self.topology.ep_size
        hosted = {
            (layer, e) for n in self.names for layer, row in enumerate(self._planned(n)) for e in row if e != EMPTY
        }
        everything = {(layer, e) for layer in range(LAYERS) for e in self.experts}
        assert hosted | self.unhosted == everything
        assert not hosted & self.unhosted
        too_many = max(0, len(self.experts) - self.topology.num_slots)
        assert all(sum(lay == layer for lay, _ in self.unhosted) == too_many for layer in range(LAYERS))

    @invariant()
    def what_each_loss_would_lose_is_known(self):
        if not hasattr(self, "rows"):
            return
        survival = survivable(self._held(), self.topology)
        everything = self._lost(self.names)
        for rank, name in enumerate(self.names):
            rest = [other for other in self.names if other != name]
            assert set(survival.lost_with_rank[rank]) == self._lost(rest) - everything


TestChanging = Changing.TestCase
TestChanging.settings = settings(max_examples=60, stateful_step_count=20)
