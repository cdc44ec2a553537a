"""The controller against a plain model of dictionaries and loops, over arbitrary histories."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eplb_core import Topology, rebalance, round_robin
from eplb_core.control import (
    ControlConfig,
    ModelConfig,
    Reason,
    abandon,
    adopt,
    commit,
    decide,
    due,
    init,
    observe,
    placement_at,
)
from eplb_core.costs import Costs, Links, migration_cost
from eplb_core.load import sliding_window

SHAPES = {"main": (3, 5, Topology(ep_size=2, slots_per_rank=4)), "draft": (1, 4, Topology(ep_size=2, slots_per_rank=3))}
WINDOWS = 2


def busiest_by_layer(placement, load, topology):
    """Token by token: each copy serves an equal share of its expert's."""
    busiest = []
    for row, tokens in zip(placement.tolist(), load.tolist(), strict=True):
        ranks = [0.0] * topology.ep_size
        for slot, expert in enumerate(row):
            if expert >= 0:
                ranks[slot // topology.slots_per_rank] += tokens[expert] / row.count(expert)
        busiest.append(max(ranks))
    return busiest


class Controlling(RuleBasedStateMachine):
    """`self.model` holds, for each model, what must be live, in plain lists."""

    @initialize(
        interval=st.integers(1, 6),
        first=st.none() | st.integers(1, 5),
        threshold=st.sampled_from([1.0, 0.9, 0.7]),
        hysteresis=st.sampled_from([0.0, 0.2]),
        min_gain=st.sampled_from([0.0, 0.1]),
        price=st.none() | st.sampled_from([0.0, 1.0, 100.0]),
    )
    def begin(self, interval, first, threshold, hysteresis, min_gain, price):
        costs = None
        if price is not None:
            links = Links(within_node=1.0, across_nodes=1.0, latency=0.0)
            costs = Costs(bytes_per_expert=int(price), seconds_per_token=1.0, links=links)
        models = {
            name: ModelConfig(topology, num_logical, estimator=sliding_window(WINDOWS), costs=costs)
            for name, (_, num_logical, topology) in SHAPES.items()
        }
        self.config = ControlConfig(
            models, interval=interval, first=first, threshold=threshold, hysteresis=hysteresis, min_gain=min_gain
        )
        start = {name: round_robin(layers, logical, topo) for name, (layers, logical, topo) in SHAPES.items()}
        self.state = init(self.config, start)
        self.step, self.next_step = 0, first if first is not None else max(interval // 4, 1)
        self.model = {
            name: {"live": start[name].copy(), "past": [start[name].copy()], "target": None, "seen": [], "acts": False}
            for name in SHAPES
        }

    @rule(steps=st.integers(0, 7))
    def serve_nothing(self, steps):
        self.state = observe(self.config, self.state, steps=steps)
        self.step += steps

    @rule(data=st.data(), name=st.sampled_from(sorted(SHAPES)))
    def serve(self, data, name):
        layers, num_logical, _ = SHAPES[name]
        tokens = st.lists(st.integers(0, 50), min_size=num_logical, max_size=num_logical)
        load = np.asarray(data.draw(st.lists(tokens, min_size=layers, max_size=layers)))
        load.setflags(write=False)
        self.state = observe(self.config, self.state, {name: load})
        self.step += 1
        self.model[name]["seen"].append(load)

    @rule(data=st.data(), name=st.sampled_from(sorted(SHAPES)))
    def serve_counting_slots(self, data, name):
        """Counts of any past epoch are credited to what the slots held then."""
        model, (layers, num_logical, topology) = self.model[name], SHAPES[name]
        epoch = data.draw(st.integers(0, len(model["past"]) - 1))
        tokens = st.lists(st.integers(0, 50), min_size=topology.num_slots, max_size=topology.num_slots)
        counts = np.asarray(data.draw(st.lists(tokens, min_size=layers, max_size=layers)))
        load = np.zeros((layers, num_logical), dtype=np.int64)
        for (layer, slot), expert in np.ndenumerate(model["past"][epoch]):
            load[layer, expert] += counts[layer, slot]
        self.state = observe(self.config, self.state, {name: counts}, epochs={name: epoch}, steps=2)
        self.step += 2
        model["seen"].append(load)

    @rule()
    def decide_and_adopt(self):
        was_due = self.step >= self.next_step and all(model["target"] is None for model in self.model.values())
        assert due(self.state) == was_due
        decisions = decide(self.config, self.state)
        assert decisions.keys() == SHAPES.keys()
        self.state = adopt(self.config, self.state, decisions)
        if not was_due:
            assert {decision.reason for decision in decisions.values()} == {Reason.NOT_DUE}
            return
        self.next_step += self.config.interval
        for name, decision in decisions.items():
            self._check(name, decision)

    def _check(self, name, decision):
        model, (layers, num_logical, topology) = self.model[name], SHAPES[name]
        load = sum(model["seen"][-WINDOWS:], np.zeros((layers, num_logical), dtype=np.int64))
        before = busiest_by_layer(model["live"], load, topology)
        held = load.sum() / topology.ep_size / sum(before) if sum(before) else 1.0
        assert abs(decision.balancedness - held) < 1e-9
        model["acts"] = held < self.config.threshold - (0 if model["acts"] else self.config.hysteresis)
        best = rebalance(load, topology, previous=model["live"])
        if not model["acts"] or np.array_equal(best, model["live"]):
            assert decision.reason is Reason.BALANCED
            return
        target = self._affordable(name, load, best, before)
        after = busiest_by_layer(target, load, topology)
        gain = sum(before) - sum(after)
        cost, saved = self._cost(name, target), gain / max(len(model["seen"][-WINDOWS:]), 1)
        worth = gain > 1e-9 and gain >= self.config.min_gain * sum(before) - 1e-9 and (cost is None or saved >= cost)
        assert decision.reason is (Reason.REBALANCE if worth else Reason.NOT_WORTH_IT)
        if cost is not None:
            np.testing.assert_allclose([decision.saved_seconds, decision.cost_seconds], [saved, cost])
        if worth:
            np.testing.assert_array_equal(decision.placement, target)
            model["target"] = target

    def _cost(self, name, target):
        costs = self.config.models[name].costs
        if costs is None:
            return None
        return migration_cost(self.model[name]["live"], target, SHAPES[name][2], costs).seconds

    def _affordable(self, name, load, best, before):
        """Leave out the layers that save less than their share of the cost, by experts moved."""
        cost, (_, _, topology) = self._cost(name, best), SHAPES[name]
        if cost is None:
            return best
        live, windows = self.model[name]["live"], max(len(self.model[name]["seen"][-WINDOWS:]), 1)
        moved = []
        for old, new in zip(
            live.reshape(len(live), topology.ep_size, -1),
            best.reshape(live.shape[0], topology.ep_size, -1),
            strict=True,
        ):
            moved.append(sum(len(set(b.tolist()) - set(a.tolist())) for a, b in zip(old, new, strict=True)))
        after = busiest_by_layer(best, load, topology)
        saved = [(x - y) / windows for x, y in zip(before, after, strict=True)]
        keep = [s > 0 and s >= m * cost / max(sum(moved), 1) for s, m in zip(saved, moved, strict=True)]
        return np.where(np.asarray(keep)[:, None], best, live)

    def _moving(self):
        return sorted(name for name, model in self.model.items() if model["target"] is not None)

    @precondition(lambda self: self._moving())
    @rule(data=st.data())
    def commit_some_layers(self, data):
        name = data.draw(st.sampled_from(self._moving()))
        model = self.model[name]
        layers = data.draw(st.lists(st.integers(0, len(model["live"]) - 1), unique=True, min_size=1))
        self.state = commit(self.config, self.state, name, layers)
        model["live"] = model["live"].copy()
        model["live"][layers] = model["target"][layers]
        model["past"].append(model["live"])
        if np.array_equal(model["live"], model["target"]):
            model["target"] = None
            while self.next_step <= self.step:
                self.next_step += self.config.interval

    @precondition(lambda self: self._moving())
    @rule(data=st.data())
    def fail(self, data):
        name = data.draw(st.sampled_from(self._moving()))
        self.state = abandon(self.config, self.state, name)
        self.model[name]["target"] = None
        self.next_step += self.config.interval

    @invariant()
    def what_is_live_is_known(self):
        if not hasattr(self, "state"):
            return
        assert (self.state.step, self.state.next_step) == (self.step, self.next_step)
        for name, model in self.model.items():
            state = self.state.models[name]
            np.testing.assert_array_equal(state.placement, model["live"])
            assert state.epoch == len(model["past"]) - 1
            assert (state.target is None) == (model["target"] is None)
            for epoch, placement in enumerate(model["past"]):
                np.testing.assert_array_equal(placement_at(state, epoch), placement)


TestControlling = Controlling.TestCase
TestControlling.settings = settings(max_examples=100, stateful_step_count=30)
