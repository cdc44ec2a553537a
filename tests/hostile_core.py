"""Every public function of `eplb_core` with good arguments, for the tests of hostile input."""

import tempfile
from functools import partial

import numpy as np

import eplb_core
from eplb_core import (
    EplbError,
    Topology,
    control,
    costs,
    elastic,
    load,
    plan_moves,
    schedule_rounds,
    simulate,
    trace,
)
from eplb_core.control import ControlConfig, ModelConfig
from eplb_core.elastic import survive
from eplb_core.simulate import configuration, sweep
from eplb_core.simulate.configuration import Configuration
from eplb_core.snapshot import Snapshot, load_snapshot, save_snapshot
from tests.hostile import Argument, Call

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3, num_nodes=2)
GROWN = Topology(ep_size=6, slots_per_rank=3, num_nodes=2)
LOAD = np.arange(20).reshape(2, 10) % 7
TRACE = np.stack([LOAD, LOAD[::-1], LOAD[:, ::-1]])
OLD = eplb_core.round_robin(2, 10, TOPOLOGY)
NEW = eplb_core.rebalance(LOAD, TOPOLOGY, policy="greedy")
PLAN = plan_moves(OLD, NEW, TOPOLOGY)
CONFIG = ControlConfig({"main": ModelConfig(TOPOLOGY, 10)}, interval=4, first=1)
STATE = control.init(CONFIG, {"main": OLD})
SEEN = control.observe(CONFIG, STATE, {"main": LOAD})
DECISIONS = control.decide(CONFIG, SEEN)
MOVING = control.adopt(CONFIG, SEEN, DECISIONS)
ESTIMATOR = load.sliding_window(2)

topology = Argument(TOPOLOGY, "topology")
placed = Argument(OLD, "ids")
target = Argument(NEW, "ids")
tokens = Argument(LOAD, "load")
of_more_experts = Argument(LOAD, "load", ("more columns",))  # those without a copy are served by nobody
windows = Argument(TRACE, "load")
plan = Argument(PLAN, "value")
value = partial(Argument, kind="value")
count = partial(Argument, kind="count")
option = partial(Argument, kind="count", but=("None",))
number = partial(Argument, kind="number")
word = partial(Argument, kind="word")
ANY_LAYERS = ("one more layer",)
ONE_LAYER = ("1-d",)
FUNCTIONS = ("lambda", "type")


def of_placement(function, **more) -> Call:
    """A function of a placement, a load and a topology."""
    return Call(function, {"physical_to_logical": placed, "load": of_more_experts, "topology": topology} | more)


def verify(**arguments) -> tuple:
    """`verify_plan`, whose answer to a bad plan is violations."""
    found = eplb_core.verify_plan(**arguments)
    if found:
        raise EplbError(str(found[0]))
    return found


def in_a_folder(write, **arguments) -> None:
    """Write to a file that vanishes."""
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/file.npz", **arguments)


def of_config(function, **more) -> Call:
    """A function of the controller."""
    return Call(function, {"config": value(CONFIG), "state": value(STATE)} | more)


OPTIONS = {
    "policy": word("incremental"),
    "num_groups": count(1),
    "hierarchy": word("auto"),
    "previous": placed._replace(but=("None",)),
    "tolerance": number(0.1, but=("None",)),
    "max_moves": option(3),
    "max_total_moves": option(4),
    "cross_node_cost": number(2.0),
    "risk": number(0.5),
    "spread": word(None, but=("None",)),
}
GROUPS = {"max_extra_moves": option(1), "tolerance": number(0.1)}

PLANNING = {
    "Topology": Call(Topology, {"ep_size": count(4), "slots_per_rank": count(3), "num_nodes": count(2)}),
    "Topology.from_experts": Call(
        Topology.from_experts,
        {"num_logical": count(10), "ep_size": count(4), "num_redundant": count(2), "num_nodes": count(2)},
    ),
    "apply_moves": Call(eplb_core.apply_moves, {"values": value(OLD), "plan": plan}),
    "balancedness": of_placement(eplb_core.balancedness),
    "check_placement": Call(
        eplb_core.check_placement,
        {"physical_to_logical": placed._replace(but=ANY_LAYERS), "topology": topology, "num_logical": option(10)},
    ),
    "derive_maps": Call(
        eplb_core.derive_maps,
        {
            "physical_to_logical": placed._replace(but=(*ANY_LAYERS, *ONE_LAYER, "more columns", "fewer columns")),
            "num_logical": count(10),
            "max_replicas": option(4),
        },
    ),
    "load_bound": Call(eplb_core.load_bound, {"load": tokens._replace(but=("fewer columns",)), "topology": topology}),
    "model_balancedness": of_placement(eplb_core.model_balancedness),
    "moved_experts": Call(eplb_core.moved_experts, {"old": placed, "new": target, "topology": topology}),
    "plan_moves": Call(
        eplb_core.plan_moves,
        {
            "old": placed,
            "new": target,
            "topology": topology,
            "live_ranks": Argument([0, 1, 2, 3], "ranks", ("None",)),
            "fan_out": word("node"),
        },
    ),
    "preserve_slots": Call(eplb_core.preserve_slots, {"new": target, "old": placed, "topology": topology}),
    "rank_load": of_placement(eplb_core.rank_load),
    "rebalance": Call(eplb_core.rebalance, {"load": tokens, "topology": topology} | OPTIONS),
    "round_robin": Call(
        eplb_core.round_robin, {"num_layers": count(2), "num_logical": count(10), "topology": topology}
    ),
    "schedule_rounds": Call(
        eplb_core.schedule_rounds,
        {"plan": plan, "topology": topology, "layers": Argument([0, 1], "ranks", ("None",))},
    ),
    "verify_plan": Call(
        verify,
        {
            "old": value(OLD),
            "new": value(NEW),
            "plan": plan,
            "topology": topology,
            "schedule": value(schedule_rounds(PLAN, TOPOLOGY), but=("None",)),
            "live_ranks": Argument([0, 1, 2, 3], "ranks", ("None",)),
        },
    ),
}

LOADS = {
    "last_value": Call(load.last_value, {}),
    "sliding_window": Call(load.sliding_window, {"size": count(3)}),
    "exponential_decay": Call(load.exponential_decay, {"half_life": number(2.0)}),
    "trend_forecast": Call(load.trend_forecast, {"size": count(3), "horizon": count(2)}),
    "logical_load": Call(
        load.logical_load,
        {"slot_counts": Argument(OLD, "load"), "physical_to_logical": placed, "num_logical": count(10)},
    ),
    "Estimator.init": Call(ESTIMATOR.init, {"num_layers": count(2), "num_logical": count(10)}),
    "Estimator.update": Call(lambda load: ESTIMATOR.update(ESTIMATOR.init(2, 10), load), {"load": tokens}),
}

CONTROL = {
    "ModelConfig": Call(
        ModelConfig,
        {
            "topology": topology,
            "num_logical": count(10),
            "planner": value(eplb_core.rebalance, but=FUNCTIONS),
            "estimator": value(load.last_value()),
            "costs": value(costs.Costs(), but=("None",)),
        },
    ),
    "ControlConfig": Call(
        ControlConfig,
        {
            "models": value(CONFIG.models),
            "interval": count(4),
            "first": option(1),
            "threshold": number(0.9),
            "hysteresis": number(0.1),
            "min_gain": number(0.1),
            "horizon": option(4),
            "min_return": number(1.0),
            "window": option(4),
        },
    ),
    "init": Call(control.init, {"config": value(CONFIG), "placements": value({"main": OLD})}),
    "init, one placement": Call(
        lambda placement: control.init(CONFIG, {"main": placement}), {"placement": placed._replace(but=ANY_LAYERS)}
    ),
    "observe": of_config(
        control.observe, loads=value({"main": LOAD}, but=("None",)), epochs=value({}, but=("None",)), steps=count(1)
    ),
    "observe, one load": Call(lambda load: control.observe(CONFIG, STATE, {"main": load}), {"load": tokens}),
    "observe, one epoch": Call(
        lambda load, epoch: control.observe(CONFIG, STATE, {"main": load}, epochs={"main": epoch}),
        {"load": Argument(OLD, "load"), "epoch": count(0)},
    ),
    "decide": of_config(control.decide),
    "decide, one plan": Call(
        lambda plan: control.decide(
            ControlConfig({"main": ModelConfig(TOPOLOGY, 10, planner=lambda *_, **__: plan)}),
            SEEN._replace(next_step=0),
        ),
        {"plan": target},
    ),
    "due": Call(control.due, {"state": value(STATE)}),
    "compare": Call(control.compare, {"old": placed, "new": target, "load": of_more_experts, "topology": topology}),
    "adopt": Call(
        control.adopt,
        {"config": value(CONFIG), "state": value(SEEN), "decisions": value(DECISIONS), "step": option(1)},
    ),
    "adopt, one placement": Call(
        lambda placement: control.adopt(CONFIG, SEEN, {"main": DECISIONS["main"]._replace(placement=placement)}),
        {"placement": target._replace(but=("None",))},
    ),
    "commit": Call(
        control.commit,
        {
            "config": value(CONFIG),
            "state": value(MOVING),
            "name": word("main"),
            "layers": Argument([0, 1], "ranks", ("None",)),
            "placement": target._replace(but=("None",)),
        },
    ),
    "abandon": Call(control.abandon, {"config": value(CONFIG), "state": value(MOVING), "name": word("main")}),
    "measure": of_config(control.measure, name=word("main"), seconds=number(1.0)),
    "restore": of_config(control.restore, name=word("main"), load=value(SEEN.models["main"].load), epoch=count(0)),
    "later": Call(control.later, {"config": value(CONFIG), "next_step": count(3), "step": count(5)}),
    "placement_at": Call(control.placement_at, {"state": value(STATE.models["main"]), "epoch": count(0)}),
}

SIZES = {
    "lose_ranks": of_placement(
        elastic.lose_ranks, dead_ranks=Argument([1], "ranks"), slots_per_rank=option(4), **GROUPS
    ),
    "shrink": of_placement(elastic.shrink, leaving_ranks=Argument([1], "ranks"), slots_per_rank=option(4), **GROUPS),
    "grow": of_placement(
        elastic.grow,
        new_topology=Argument(GROWN, "topology"),
        joining_ranks=Argument([4, 5], "ranks", ("None",)),
        **GROUPS,
    ),
    "survivable": Call(
        survive.survivable, {"physical_to_logical": placed._replace(but=ANY_LAYERS), "topology": topology}
    ),
    "dry_run": of_placement(survive.dry_run, level=word("node")),
    "Links": Call(
        costs.Links,
        {
            "within_node": number(1e9, but=("infinite",)),
            "across_nodes": number(1e9, but=("infinite",)),
            "latency": number(0.0),
        },
    ),
    "Costs": Call(
        costs.Costs,
        {
            "bytes_per_expert": number(100),
            "seconds_per_token": number(1e-6),
            "scale": number(1.0),
            "links": value(costs.Links()),
            "overlapped": value(False),
        },
    ),
    "migration_cost": Call(
        costs.migration_cost,
        {
            "old": placed,
            "new": target,
            "topology": topology,
            "costs": value(costs.Costs()),
        },
    ),
    "migration_cost, a plan": Call(
        partial(costs.migration_cost, OLD, NEW, TOPOLOGY, costs.Costs()), {"plan": plan._replace(but=("None",))}
    ),
    "transfer_matrix": Call(
        costs.transfer_matrix, {"schedule": value(schedule_rounds(PLAN, TOPOLOGY)), "topology": topology}
    ),
}

REPLAYS = {
    "simulate": Call(
        simulate.simulate,
        {
            "load": windows._replace(but=("fewer columns",)),
            "topology": topology,
            "policy": word("incremental", but=FUNCTIONS),
            "estimator": word("window:2"),
            "interval": option(1),
            "costs": value(costs.Costs(), but=("None",)),
            "progress": value(None, but=("None", *FUNCTIONS)),
            "threshold": number(0.9, but=("None",)),
            "start": word("even"),
            "options": value({}, but=("dict",)),
        },
    ),
    "replay_trace": Call(
        simulate.replay_trace,
        {
            "load": windows._replace(but=("fewer columns",)),
            "configuration": value(Configuration(TOPOLOGY)),
            "costs": value(costs.Costs()),
            "progress": value(None, but=("None", *FUNCTIONS)),
        },
    ),
    "balancedness_bound": Call(
        simulate.balancedness_bound,
        {"load": windows._replace(but=("fewer columns",)), "topology": topology},
    ),
    "check_trace": Call(
        simulate.check_trace,
        {"load": windows._replace(but=("fewer columns", "more columns")), "fewest_windows": count(2)},
    ),
    "grid": Call(configuration.grid, {"topologies": value(TOPOLOGY)}),
    "parse_estimator": Call(configuration.parse_estimator, {"spec": word("last")}),
    "sweep": Call(
        sweep.sweep,
        {
            "load": windows._replace(but=("fewer columns",)),
            "configurations": value([Configuration(TOPOLOGY, "static")]),
            "costs": value(costs.Costs(), but=("None",)),
            "jobs": count(1, but=("beyond int64", "beyond printing")),
            "progress": value(None, but=("None", *FUNCTIONS)),
        },
    ),
}

NOWHERE = "/nowhere/file.npz"  # what is accepted fails to be written there
ANY_SHAPE = ("more columns", "fewer columns", "one more layer", "4-d")

WRITES = {
    "write_trace": Call(
        partial(in_a_folder, trace.write_trace),
        {"load": windows._replace(but=ANY_SHAPE[:2]), "metadata": value({}, but=("None", "dict"))},
    ),
    "write_trace, by windows": Call(
        lambda window: in_a_folder(trace.write_trace, load=iter([LOAD, window])), {"window": tokens}
    ),
    "write_placement": Call(
        partial(trace.write_placement, NOWHERE),
        {
            "physical_to_logical": placed._replace(but=ANY_LAYERS),
            "topology": topology,
            "format": word("npz", but=("None", "no text")),
            "num_logical": option(10),
            "layer_ids": value([0, 1], but=("None",)),
            "metadata": value({}, but=("None", "dict")),
        },
    ),
    "write_plan": Call(
        partial(trace.write_plan, NOWHERE),
        {
            "old": placed._replace(but=ANY_SHAPE),
            "new": target._replace(but=ANY_SHAPE),
            "plan": plan,
            "topology": topology,
            "schedule": value(schedule_rounds(PLAN, TOPOLOGY), but=("None",)),
        },
    ),
    "save_snapshot": Call(partial(save_snapshot, NOWHERE), {"snapshot": value(Snapshot(OLD, TOPOLOGY, 10))}),
    "save_snapshot, its parts": Call(
        lambda **parts: save_snapshot(NOWHERE, Snapshot(**parts)),
        {
            "physical_to_logical": placed._replace(but=ANY_LAYERS),
            "topology": topology,
            "num_logical": count(10),
            "epoch": count(0),
            "load": value(None, but=("None", "dict", "ragged", "number", "array")),
            "metadata": value({}, but=("None", "dict")),
        },
    ),
    "load_snapshot": Call(partial(load_snapshot, NOWHERE), {"topology": Argument(TOPOLOGY, "topology", ("None",))}),
}
CALLS = PLANNING | LOADS | CONTROL | SIZES | REPLAYS | WRITES
