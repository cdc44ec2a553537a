"""The balancer in a serving loop: ranks that are threads where a case must be exact, real processes elsewhere."""

import logging
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import EplbError, Topology, model_balancedness, round_robin
from eplb_core.control import Reason
from eplb_core.costs import Links
from eplb_core.snapshot import load_snapshot, save_snapshot
from eplb_torch import ExpertWeights, InProcessWorld, ProcessGroupTransport, RearrangeError, TransportError
from eplb_torch.balancer import ExpertBalancer
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.balancer.planning import PlanningError
from eplb_torch.balancer.tally import Tally
from eplb_torch.device_maps import DeviceMaps
from eplb_torch.live_model import LiveModel
from eplb_torch.metrics import BalancerMetrics
from tests.expert_rows import expert_layers, wrong_rows
from tests.multiprocess import run_ranks

TOPOLOGY = Topology(ep_size=3, slots_per_rank=4)
ALONE = Topology(ep_size=1, slots_per_rank=12)
LAYERS, LOGICAL = 5, 9
FAST = {"step_interval": 8, "window_size": 6, "timeout": 5.0}


def live_model(rank, layers=LAYERS, logical=LOGICAL, topology=TOPOLOGY):
    placement = round_robin(layers, logical, topology)
    weights = ExpertWeights(expert_layers(placement, topology, rank))
    return LiveModel(weights, DeviceMaps(placement, logical), topology, placement)


def skewed(rank, step=0, layers=LAYERS, logical=LOGICAL):
    """Tokens of one rank: other experts are hot in each layer, and other ones every 150 steps."""
    load = torch.full((layers, logical), 5 + rank, dtype=torch.int64)
    for layer in range(layers):
        load[layer, (layer + step // 150) % logical] = 400
        load[layer, (layer + 1 + step // 150) % logical] = 100
    return load


def check_rows(model, rank):
    assert wrong_rows(list(model.weights.layers), model.placement, model.topology, rank) == []


def on_threads(function, size=3, timeout=60.0):
    """Results of all ranks; the first exception is raised."""
    results = InProcessWorld(size).run(function, timeout=timeout)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def serve(balancer, rank, steps, barrier=None, first=1):
    """Serve in lock-step; tell at which steps which layers switched."""
    model, switched = balancer.models["main"], []
    for step in range(first, first + steps):
        if barrier is not None:
            barrier.wait(20.0)
            time.sleep(0.001)
        if layers := balancer.step(skewed(rank, step) if balancer.recording else None):
            switched.append((step, dict(layers)))
            check_rows(model, rank)
    return switched


@pytest.mark.parametrize("use_async", [False, True])
def test_weights_and_maps_follow_the_load(use_async):
    barrier = threading.Barrier(3)

    def run(transport):
        model = live_model(transport.rank)
        pointers = [model.maps.logical_to_physical.data_ptr(), model.maps.replica_count.data_ptr()]
        view = model.maps.layer(2)
        balancer = ExpertBalancer(model, transport, FAST | {"use_async": use_async})
        switched = serve(balancer, transport.rank, 290, barrier)
        balancer.close()
        check_rows(model, transport.rank)
        assert [model.maps.logical_to_physical.data_ptr(), model.maps.replica_count.data_ptr()] == pointers
        assert view.replica_count.tolist() == [int((model.placement[2] == e).sum()) for e in range(LOGICAL)]
        np.testing.assert_array_equal(balancer.state.models["main"].placement, model.placement)
        return switched, model.placement.tolist()

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    switched, placement = results[0]
    if not use_async:
        assert switched[0][0] == 2  # a quarter of the interval
    assert {layer for _, layers in switched for layer in layers["main"]} == set(range(LAYERS))
    last = skewed(0, 290).numpy()
    before = model_balancedness(round_robin(LAYERS, LOGICAL, TOPOLOGY), last, TOPOLOGY)
    assert model_balancedness(np.asarray(placement), last, TOPOLOGY) > 1.2 * before


def test_ranks_stay_in_step_though_some_serve_nothing():
    barrier = threading.Barrier(3)

    def run(transport):
        rank = transport.rank
        model = live_model(rank)
        balancer = ExpertBalancer(model, transport, FAST)
        for step in range(1, 300):
            barrier.wait(20.0)
            time.sleep(0.001)
            busy = balancer.recording and rank == step // 100  # the others run dummy batches
            balancer.step(skewed(rank, step) if busy else None)
        balancer.close()
        check_rows(model, rank)
        return model.placement.tolist(), balancer.state.step

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    assert results[0][1] == 299
    assert results[0][0] != round_robin(LAYERS, LOGICAL, TOPOLOGY).tolist()


def test_load_is_summed_over_ranks_and_over_the_last_window_only():
    def run(transport):
        balancer = ExpertBalancer(live_model(transport.rank), transport, FAST | {"use_async": False, "window_size": 3})
        wanted = []
        for step in range(1, 19):
            wanted.append(balancer.recording)
            load = torch.full((LAYERS, LOGICAL), 10**6, dtype=torch.int64)
            if balancer.recording:
                load = torch.full((LAYERS, LOGICAL), step * 10**transport.rank, dtype=torch.int32)
            balancer.step(load)
        return wanted, balancer.state.models["main"].load.rows[0].tolist()

    (wanted, load), *_ = on_threads(run)
    # Decisions at steps 2, 10 and 18.
    assert [step for step, is_wanted in enumerate(wanted, 1) if is_wanted] == [1, 2, 8, 9, 10, 16, 17, 18]
    assert load == [[(16 + 17 + 18) * 111] * LOGICAL] * LAYERS


def test_a_window_longer_than_the_interval_covers_several_decisions():
    config = BalancerConfig(window_size=20, step_interval=8)
    assert config.recorded_steps == 8
    balancer = ExpertBalancer(live_model(0, topology=ALONE), InProcessWorld(1).transport(0), config)
    assert len(balancer.state.models["main"].load.rows) == 3


def test_slot_counts_are_credited_to_what_slots_held_while_they_counted():
    def run(transport):
        rank, topology = transport.rank, TOPOLOGY
        by_slot, by_expert = live_model(rank), live_model(rank)
        balancer = ExpertBalancer(
            {"slots": by_slot, "experts": by_expert}, transport, FAST | {"use_async": False, "timeout": 10.0}
        )
        for step in range(1, 60):
            counts = torch.arange(LAYERS * topology.num_slots).reshape(LAYERS, -1) * (step % 7) + rank + step // 20 * 50
            load = torch.zeros(LAYERS, LOGICAL, dtype=torch.int64)
            load.scatter_add_(1, torch.from_numpy(by_slot.placement).long(), counts)
            balancer.step({"experts": load}, slot_load={"slots": counts})
            assert (by_slot.placement == by_expert.placement).all()
        loads = [balancer.state.models[name].load.rows[0].tolist() for name in ("slots", "experts")]
        return loads, balancer.state.models["slots"].epoch

    (loads, epoch), *_ = on_threads(run)
    assert loads[0] == loads[1]
    assert epoch >= 2


def test_counts_of_a_layer_that_switches_between_are_settled_before():
    model = live_model(0, topology=ALONE)
    tally = Tally(model)
    counts = torch.ones(LAYERS, ALONE.num_slots, dtype=torch.int64)
    tally.add_slots(counts)
    tally.settle()
    moved = np.roll(model.placement[0], 1)
    model.commit(moved, layer=0)
    tally.add_slots(counts * 10)
    expected = np.zeros((LAYERS, LOGICAL), dtype=int)
    for layer in range(LAYERS):
        for old, new in zip(round_robin(LAYERS, LOGICAL, ALONE)[layer], model.placement[layer], strict=True):
            expected[layer, old] += 1
            expected[layer, new] += 10
    np.testing.assert_array_equal(tally.take(), expected)
    assert tally.take().sum() == 0


def test_several_models_share_a_cadence_and_move_one_after_another():
    barrier = threading.Barrier(3)

    def run(transport):
        rank = transport.rank
        models = {"main": live_model(rank), "draft": live_model(rank, layers=2, logical=7)}
        balancer = ExpertBalancer(models, transport, FAST)
        switched = set()
        for _ in range(400):
            barrier.wait(20.0)
            time.sleep(0.001)
            load = {"main": skewed(rank), "draft": skewed(rank, layers=2, logical=7)}
            for name, layers in balancer.step(load).items():
                switched |= {(name, layer) for layer in layers}
                check_rows(models[name], rank)
        balancer.close()
        return switched, {name: model.placement.tolist() for name, model in models.items()}

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    assert {name for name, _ in results[0][0]} == {"main", "draft"}


def test_a_step_on_which_nothing_happens_allocates_nothing():
    balancer = ExpertBalancer(
        live_model(0, topology=ALONE), InProcessWorld(1).transport(0), {"step_interval": 10**6, "window_size": 10**6}
    )
    load = torch.ones(LAYERS, LOGICAL, dtype=torch.int64)
    for _ in range(10):
        balancer.step(load)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            balancer.step(load)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200  # less than a byte a step: the counter itself


def test_balancedness_is_logged_at_its_interval_and_costs_nothing_when_off(caplog):
    caplog.set_level(logging.INFO, logger="eplb_torch.balancer")
    calls = []

    def run(transport, log_balancedness):
        gather = transport.gather

        def counted(payload, timeout):
            calls.append(transport.rank)
            return gather(payload, timeout)

        transport.gather = counted
        options = {"use_async": False, "log_balancedness": log_balancedness, "log_balancedness_interval": 5}
        balancer = ExpertBalancer(live_model(transport.rank), transport, FAST | options | {"step_interval": 1000})
        for step in range(1, 21):
            assert balancer.recording or not log_balancedness
            balancer.step(skewed(transport.rank, step))

    on_threads(lambda transport: run(transport, False))
    assert calls == []
    on_threads(lambda transport: run(transport, True))
    assert len(calls) == 3 * 4
    total = sum(skewed(rank) for rank in range(3)).numpy()
    even = model_balancedness(round_robin(LAYERS, LOGICAL, TOPOLOGY), total, TOPOLOGY)
    lines = [record.getMessage() for record in caplog.records if "balancedness" in record.getMessage()]
    assert len(lines) == 4
    assert all(line.startswith(f"step {5 * (i + 1)}, main: balancedness {even:.3f}") for i, line in enumerate(lines))


def test_balancedness_is_logged_beside_moves_on_a_transport_of_its_own(caplog):
    caplog.set_level(logging.INFO, logger="eplb_torch.balancer")
    barrier, log_world = threading.Barrier(3), InProcessWorld(3)

    def run(transport):
        balancer = ExpertBalancer(
            *(live_model(transport.rank), transport, FAST | {"log_balancedness": True, "log_balancedness_interval": 2}),
            log_transport=log_world.transport(transport.rank),
        )
        serve(balancer, transport.rank, 100, barrier)
        balancer.close()

    on_threads(run)
    lines = [record.getMessage() for record in caplog.records if "tokens per rank" in record.getMessage()]
    assert len(lines) >= 45


def test_ranks_that_decide_differently_all_raise_and_nothing_moves():
    def run(transport):
        model = live_model(transport.rank)
        policy = "greedy" if transport.rank == 1 else "incremental"
        balancer = ExpertBalancer(model, transport, FAST | {"use_async": False, "policy": policy})
        balancer.step(skewed(transport.rank))
        with pytest.raises(PlanningError, match=r"ranks \[1\] decided differently"):
            balancer.step(skewed(transport.rank))
        assert (model.placement == round_robin(LAYERS, LOGICAL, TOPOLOGY)).all()
        assert balancer.failure is None
        assert not balancer.in_flight
        assert balancer.state.next_step == 10
        return [step for step in range(3, 30) if _raises(PlanningError, balancer.step, skewed(transport.rank, step))]

    assert on_threads(run) == [[10, 18, 26]] * 3  # tried again at every interval


def _raises(kind, function, *args):
    try:
        function(*args)
    except kind:
        return True
    return False


def test_a_planner_that_fails_on_one_rank_is_an_error_on_all():
    barrier = threading.Barrier(3)

    def run(transport):
        rank = transport.rank
        model = live_model(rank)
        balancer = ExpertBalancer(model, transport, FAST)
        if rank == 2:
            model_config = balancer._control.models["main"]
            object.__setattr__(model_config, "planner", lambda *_, **__: 1 / 0)
        errors = []
        for step in range(1, 150):
            barrier.wait(20.0)
            time.sleep(0.001)
            try:
                balancer.step(skewed(rank, step))
            except PlanningError as error:
                errors.append(str(error))
        balancer.close()
        assert (model.placement == round_robin(LAYERS, LOGICAL, TOPOLOGY)).all()
        return errors

    for rank, errors in enumerate(on_threads(run)):
        assert len(errors) >= 2
        assert all("failed on ranks [2]" in error for error in errors)
        assert ("division by zero" in errors[0]) == (rank == 2)


def test_a_failed_move_leaves_whole_layers_and_is_tried_again():
    def run(transport):
        rank = transport.rank
        model = live_model(rank)
        row = model.weights.row_bytes(0)
        config = FAST | {"use_async": False, "max_staging_bytes": 4 * row, "timeout": 1.0}
        balancer = ExpertBalancer(model, transport, config)
        exchange, calls = transport.exchange, []

        def fails_once(*args):
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                raise TransportError("the cable was pulled")
            return exchange(*args)

        transport.exchange = fails_once
        balancer.step(skewed(rank))
        with pytest.raises(RearrangeError, match="voted against" if rank != 1 else "cable"):
            balancer.step(skewed(rank))
        check_rows(model, rank)
        np.testing.assert_array_equal(balancer.state.models["main"].placement, model.placement)
        half_way = model.placement.tolist()
        serve(balancer, rank, 30, first=3)
        return half_way, model.placement.tolist(), balancer.failure

    results = on_threads(run)
    assert results[0] == results[1] == results[2]
    half_way, end, failure = results[0]
    assert round_robin(LAYERS, LOGICAL, TOPOLOGY).tolist() != half_way != end
    assert failure is None


@pytest.mark.parametrize("use_async", [False, True])
def test_a_lost_rank_is_an_error_once_and_the_others_serve_on(use_async):
    world = InProcessWorld(3)

    def run(transport):
        rank = transport.rank
        model = live_model(rank)
        balancer = ExpertBalancer(model, transport, FAST | {"use_async": use_async, "timeout": 0.5})
        errors, deadline = [], time.monotonic() + 10.0
        while not errors and time.monotonic() < deadline:
            if rank == 2 and balancer.state.step == 12:
                world.kill(2)
                return None
            try:
                balancer.step(skewed(rank, balancer.state.step))
            except (TransportError, RearrangeError) as error:
                errors.append(error)
            time.sleep(0.001)
        assert len(errors) == 1
        assert balancer.failure is errors[0]
        assert not balancer.recording
        placement = model.placement
        for _ in range(50):
            assert balancer.step(skewed(rank)) == {}
        balancer.close()
        assert (model.placement == placement).all()
        check_rows(model, rank)
        return placement.tolist()

    results = world.run(run, timeout=30.0)
    assert results[2] is None
    assert results[0] == results[1]


def test_draining_ends_what_is_under_way_at_any_moment():
    barrier = threading.Barrier(3)

    def run(transport, steps):
        rank = transport.rank
        model = live_model(rank)
        balancer = ExpertBalancer(model, transport, FAST | {"max_staging_bytes": 2 * model.weights.row_bytes(0)})
        serve(balancer, rank, steps, barrier)
        in_flight = balancer.in_flight
        balancer.drain()
        assert not balancer.in_flight
        assert balancer.state.models["main"].target is None
        check_rows(model, rank)
        placement = model.placement.tolist()
        serve(balancer, rank, 100, barrier, first=steps + 1)
        balancer.close()
        check_rows(model, rank)
        return in_flight, placement

    seen = set()
    for steps in (1, 2, 3, 4, 6, 9):
        results = on_threads(lambda transport, steps=steps: run(transport, steps))
        assert len({str(placement) for _, placement in results}) == 1
        seen |= {in_flight for in_flight, _ in results}
    assert seen == {False, True}


def test_moves_that_do_not_pay_are_not_made():
    def run(transport, seconds_per_token):
        model = live_model(transport.rank)
        options = {"use_async": False, "seconds_per_token": seconds_per_token, "links": Links(1e6, 1e6, 0.0)}
        balancer = ExpertBalancer(model, transport, FAST | options)
        serve(balancer, transport.rank, 10)
        return balancer.decisions["main"].reason, model.placement.tolist()

    (reason, placement), *_ = on_threads(lambda transport: run(transport, 1e-12))
    assert reason is Reason.NOT_WORTH_IT
    assert placement == round_robin(LAYERS, LOGICAL, TOPOLOGY).tolist()
    (_, placement), *_ = on_threads(lambda transport: run(transport, 1.0))
    assert placement != round_robin(LAYERS, LOGICAL, TOPOLOGY).tolist()


def test_figures_reach_the_metrics():
    def run(transport):
        metrics = BalancerMetrics(["main"])
        balancer = ExpertBalancer(live_model(transport.rank), transport, FAST | {"use_async": False}, metrics=metrics)
        serve(balancer, transport.rank, 20)
        read = metrics.registry.get_sample_value
        decisions = {
            reason: read("eplb_decisions_total", {"model": "main", "reason": reason})
            for reason in ("balanced", "not_worth_it", "rebalance", "failed")
        }
        assert sum(decisions.values()) == 3  # steps 2, 10, 18
        assert decisions["rebalance"] >= 1
        assert read("eplb_epoch", {"model": "main"}) == balancer.state.models["main"].epoch >= 1
        assert read("eplb_moved_experts_total", {"model": "main"}) > 0
        within = read("eplb_moved_bytes_total", {"model": "main", "scope": "within_node"})
        row_bytes = balancer.models["main"].weights.row_bytes(0)
        assert within == read("eplb_moved_experts_total", {"model": "main"}) * row_bytes
        for phase, count in (("planning", 3), ("prepare", decisions["rebalance"]), ("commit", decisions["rebalance"])):
            assert read("eplb_phase_seconds_count", {"model": "main", "phase": phase}) == count
        assert 0 < read("eplb_balancedness_ratio", {"model": "main"}) <= 1

    on_threads(run)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_restart_goes_on_with_the_placement_and_the_load(tmp_path, suffix):
    config = FAST | {"use_async": False, "window_size": 20}  # three windows

    def run(transport, first, steps, path, model=None):
        rank = transport.rank
        model = live_model(rank) if model is None else model(rank)
        balancer = ExpertBalancer(model, transport, config)
        if first > 1:
            balancer.restore(load_snapshot(path))
        serve(balancer, rank, steps, first=first)
        if rank == 0:
            save_snapshot(path.with_suffix(suffix), balancer.snapshot())
        return model.placement.tolist(), balancer.state.models["main"].load, balancer.snapshot().epoch

    path = tmp_path / f"before{suffix}"
    (_, _, epoch), *_ = on_threads(lambda transport: run(transport, 1, 20, path))
    saved = load_snapshot(path, TOPOLOGY)

    def loaded(rank):
        weights = ExpertWeights(expert_layers(saved.physical_to_logical, TOPOLOGY, rank))
        maps = DeviceMaps(saved.physical_to_logical, LOGICAL)
        return LiveModel(weights, maps, TOPOLOGY, saved.physical_to_logical)

    (placement, load, later_epoch), *_ = on_threads(lambda transport: run(transport, 201, 3, path, loaded))
    assert epoch >= 1
    assert later_epoch >= epoch
    assert load.seen == 3  # one window of the second run; two of the first, under the other traffic
    total = sum(skewed(rank, 1) for rank in range(3)).numpy() * 8
    np.testing.assert_array_equal(load.rows[1], total)

    balancer = ExpertBalancer(live_model(0), InProcessWorld(3).transport(0), config)
    with pytest.raises(EplbError, match="that the model was loaded with"):
        balancer.restore(saved)
    balancer = ExpertBalancer(loaded(0), InProcessWorld(3).transport(0), config | {"window_size": 8})
    with pytest.raises(EplbError, match="load"):
        balancer.restore(saved)


def on_gloo(rank: int):
    """Serve on real processes, with collectives of the model beside the balancer's."""
    group, log_group = (dist.new_group(list(range(3))) for _ in range(2))
    model = live_model(rank)
    balancer = ExpertBalancer(
        *(model, ProcessGroupTransport(group), FAST | {"log_balancedness": True, "log_balancedness_interval": 7}),
        log_transport=ProcessGroupTransport(log_group),
    )
    switched = []
    for step in range(1, 4000):
        enough = torch.tensor([float(len(switched) >= 3)])
        dist.all_reduce(enough, dist.ReduceOp.MIN)
        if enough:
            break
        if layers := balancer.step(skewed(rank, step) if step % 3 != rank else None):
            switched.append((step, dict(layers)))
    balancer.close()
    return switched, model.placement.tolist(), wrong_rows(list(model.weights.layers), model.placement, TOPOLOGY, rank)


def test_real_processes_switch_at_the_same_steps():
    results = run_ranks(on_gloo, 3, timeout=90)
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) >= 3
    assert [wrong for _, _, wrong in results] == [[], [], []]


def test_a_config_takes_the_fields_of_engines():
    config = BalancerConfig.from_dict(
        {
            "window_size": 100,
            "step_interval": 300,
            "num_redundant_experts": 3,
            "log_balancedness": True,
            "log_balancedness_interval": 10,
            "use_async": False,
            "policy": "default",
        }
    )
    assert config == BalancerConfig(100, 300, 3, True, 10, False, "default")
    assert config.model(TOPOLOGY, LOGICAL, 1).planner.keywords["policy"] == "greedy"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windowsize": 3}, r"knows the fields \[.*got \['windowsize'\]"),
        ({"window_size": 0}, "window_size"),
        ({"step_interval": 1.5}, "step_interval"),
        ({"log_balancedness_interval": 0}, "log_balancedness_interval"),
        ({"use_async": "yes"}, "use_async"),
        ({"policy": "best"}, "policy"),
        ({"timeout": 0}, "timeout"),
        ({"threshold": 2.0}, "threshold"),
        ({"max_moves": -1}, "max_moves"),
        ({"num_groups": 2}, "num_groups"),
        ({"num_redundant_experts": 5}, "Use 3, or None"),
        ({"log_balancedness": True}, "log_transport"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_served(values, message):
    with pytest.raises(EplbError, match=message):
        ExpertBalancer(live_model(0), InProcessWorld(3).transport(0), values)


def test_loads_and_groups_that_do_not_fit_are_refused():
    balancer = ExpertBalancer(live_model(0), InProcessWorld(3).transport(0), FAST)
    for load, message in (
        (torch.ones(LAYERS, LOGICAL), "must be integers of shape"),
        (torch.ones(LAYERS, LOGICAL + 1, dtype=torch.int64), "must be integers of shape"),
        ({"other": torch.ones(LAYERS, LOGICAL, dtype=torch.int64)}, "names of"),
    ):
        with pytest.raises(EplbError, match=message):
            balancer.step(load)
    with pytest.raises(EplbError, match="must connect the ranks"):
        ExpertBalancer(live_model(0), InProcessWorld(2).transport(0))
    narrow = live_model(0)
    narrow.maps = DeviceMaps(narrow.placement, LOGICAL, max_replicas=2)
    planner = ExpertBalancer(narrow, InProcessWorld(3).transport(0))._control.models["main"].planner
    hot = np.zeros((LAYERS, LOGICAL), dtype=np.int64)
    hot[:, 0] = 1000
    with pytest.raises(EplbError, match="maps have room for"):
        planner(hot, TOPOLOGY, previous=None)


def test_a_renewed_balancer_goes_on_and_leaves_no_threads_behind():
    """Renewed as after a change of the group, which may happen thousands of times."""

    def run(transport, log_transport):
        model = live_model(0, topology=ALONE)
        config = FAST | {"use_async": True, "log_balancedness": True, "log_balancedness_interval": 4}
        balancer, counts = ExpertBalancer(model, transport, config, log_transport=log_transport), []
        for _ in range(4):
            for step in range(10):
                balancer.step(skewed(0, step))
            balancer.drain()
            assert balancer.decisions
            balancer = balancer.renewed(transport, log_transport=log_transport)
            assert not balancer.decisions
            deadline = time.monotonic() + 5.0
            while (names := own_threads()) and time.monotonic() < deadline:
                time.sleep(0.01)
            counts.append(names)
        balancer.close()
        return counts

    def own_threads():
        return [t.name for t in set(threading.enumerate()) - before if t.name in ("eplb-planning", "eplb-balancedness")]

    before = set(threading.enumerate())  # of other tests, which may have left some waiting
    first, second = InProcessWorld(1), InProcessWorld(1)
    log_transports = second.run(lambda transport: transport, timeout=10.0)
    (counts,) = first.run(lambda transport: run(transport, log_transports[0]), timeout=60.0)
    assert counts == [[]] * 4
