"""New weights go where the experts are now, and a reload that is not whole is not taken for one."""

import copy
import threading
import time

import numpy as np
import pytest
import torch

from eplb_core import EMPTY, EplbError, Topology, plan_moves, rebalance, round_robin
from eplb_torch import ExpertWeights, InProcessWorld, ProcessGroupTransport, Rearrangement, rearrange
from eplb_torch.dispatch import DeviceMaps, select_slots
from eplb_torch.integrations.huggingface import expert_parallel
from eplb_torch.reload import ExpertReload, held_experts, reload_experts
from tests.expert_rows import FIELDS, expert_layers, expert_row, same_bytes, wrong_rows
from tests.multiprocess import run_ranks
from tests.tiny_moe import tiny_model

TOPOLOGY = Topology(ep_size=2, slots_per_rank=4)
PLACEMENT = np.asarray([[0, 1, 0, 3, 2, 4, EMPTY, 1], [4, 3, 2, 1, 0, 0, 0, 2]])
NEW = 1000  # the new weights of expert e of layer l are those of layer l + NEW


def old_weights(rank=0) -> ExpertWeights:
    return ExpertWeights(expert_layers(PLACEMENT, TOPOLOGY, rank))


def stream(experts=range(5), layers=range(2)):
    return [(layer, name, e, expert_row(layer + NEW, e, name)) for e in experts for layer in layers for name in FIELDS]


def wrong(weights, rank=0):
    """Slots that do not hold their expert's new rows."""
    padded = np.concatenate([np.zeros((NEW, 8), dtype=int) + EMPTY, PLACEMENT])
    layers = [{}] * NEW + list(weights.layers)
    return wrong_rows(layers, padded, TOPOLOGY, rank)


def test_held_experts_says_which_slots_to_write():
    assert held_experts(PLACEMENT, TOPOLOGY, 0) == ({0: (0, 2), 1: (1,), 3: (3,)}, {4: (0,), 3: (1,), 2: (2,), 1: (3,)})
    assert held_experts(PLACEMENT, TOPOLOGY, 1) == ({2: (0,), 4: (1,), 1: (3,)}, {0: (0, 1, 2), 2: (3,)})


# The corruption


def test_a_loader_that_goes_by_the_first_placement_corrupts_the_model():
    """The example of vllm-project/vllm#55228: experts 1 and 2 have changed places when new weights come."""
    topology, first, now = Topology(2, 2), np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 2, 1, 3]])
    maps, router = DeviceMaps(now, 4).layer(0), torch.arange(4)

    def routed(load):
        """What the router finds for experts 0 to 3 after all ranks have loaded 110, 120, 130 and 140."""
        down = []
        for rank in range(2):
            rank_down = torch.zeros(2)
            load(rank, rank_down)
            down += rank_down.tolist()
        return [down[slot] for slot in select_slots(router, maps).tolist()]

    def by_the_first_placement(rank, down):
        for local, expert in enumerate(first[0, 2 * rank : 2 * rank + 2].tolist()):
            down[local] = 110.0 + 10 * expert

    def by_the_live_one(rank, down):
        rows = ((0, "down", expert, torch.tensor(110.0 + 10 * expert)) for expert in range(4))
        reload_experts(ExpertWeights([{"down": down}]), now, topology, rank, rows)

    assert routed(by_the_first_placement) == [110, 130, 120, 140]
    assert routed(by_the_live_one) == [110, 120, 130, 140]


@torch.no_grad()
def reload_a_real_model(rank):
    """Logits of a reloaded model against one that has the new experts from the start."""
    model, new = tiny_model("qwen3_moe", seed=0), tiny_model("qwen3_moe", seed=1)
    expected = copy.deepcopy(model)
    topology = Topology(2, 5)
    experts = expert_parallel(model, topology)
    for name in experts.layer_names:
        for tensor, source in zip(
            expected.get_submodule(name).parameters(), new.get_submodule(name).parameters(), strict=True
        ):
            tensor.copy_(source)
    first = experts.placement
    load = np.random.default_rng(0).lognormal(sigma=2, size=(len(first), 8))
    live = rebalance(load, topology, previous=first)
    rearrange(experts.weights, plan_moves(first, live, topology), topology, ProcessGroupTransport(), timeout=20)
    experts.commit(live)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(rank))

    def row(layer, name, expert):
        return new.get_submodule(experts.layer_names[layer]).get_parameter(name)[expert]

    def error_after_loading_by(placement):
        reload_experts(experts.weights, placement, topology, rank, row)
        return (model(ids).logits - expected(ids).logits).abs().max().item()

    return (
        error_after_loading_by(first),
        error_after_loading_by(experts.placement),
        (live != first).any(axis=1).tolist(),
    )


def test_a_real_model_serves_the_new_weights_only_if_they_are_told_where_to_go():
    results = run_ranks(reload_a_real_model, 2, timeout=100)
    for by_first, by_live, moved in results:
        assert all(moved)
        assert by_first > 1e-2
        assert by_live < 1e-4


def test_rows_under_way_would_come_back_over_the_new_ones():
    """The other half of the corruption: what a rearrangement has received before a reload is of the old weights."""
    topology = Topology(2, 3)
    old, new = round_robin(1, 4, topology), np.asarray([[0, 3, 2, 3, 2, 0]])
    old_row, new_row = torch.arange(4.0), torch.arange(4.0) + 100
    received = threading.Barrier(2, timeout=30)

    def run(transport, careful):
        mine = slice(3 * transport.rank, 3 * transport.rank + 3)
        tensor = old_row[torch.tensor(old[0, mine])].clone()
        weights = ExpertWeights([{"row": tensor}])
        moving = Rearrangement(weights, plan_moves(old, new, topology), topology, transport, timeout=10, lead=0.3)
        rows = [(0, "row", expert, new_row[expert]) for expert in range(4)]

        def is_moving():
            return not moving.done

        if careful:
            with pytest.raises(EplbError, match="under way"):
                reload_experts(weights, old, topology, transport.rank, rows, in_flight=is_moving)
            assert tensor.tolist() == old_row[torch.tensor(old[0, mine])].tolist()
            moving.wait()
            reload_experts(weights, new, topology, transport.rank, rows, in_flight=is_moving)
        else:
            deadline = time.monotonic() + 20
            while not moving.report().bytes_received:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            received.wait()
            reload_experts(weights, old, topology, transport.rank, rows)
            moving.wait()
        return tensor.tolist()

    def both(careful):
        return sum(InProcessWorld(2).run(lambda transport: run(transport, careful)), [])

    right = new_row[torch.tensor(new[0])].tolist()
    assert both(careful=False) != right
    assert both(careful=True) == right


# The rules


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["stream", "function"])
def test_every_copy_gets_the_new_rows(rank, kind):
    weights = old_weights(rank)
    source = stream() if kind == "stream" else lambda layer, name, expert: expert_row(layer + NEW, expert, name)
    reload_experts(weights, PLACEMENT, TOPOLOGY, rank, source)
    assert wrong(weights, rank) == []


def test_a_function_is_asked_only_for_what_the_rank_holds():
    asked = []

    def read(layer, name, expert):
        asked.append((layer, name, expert))
        return expert_row(layer + NEW, expert, name)

    reload_experts(old_weights(1), PLACEMENT, TOPOLOGY, 1, read)
    names = sorted(set(FIELDS) - {"empty"})
    assert asked == [(layer, name, e) for layer, held in ((0, (1, 2, 4)), (1, (0, 2))) for name in names for e in held]


def test_empty_slots_are_left_alone():
    weights = old_weights(1)
    before = {name: tensor[2].clone() for name, tensor in weights.layers[0].items()}
    reload_experts(weights, PLACEMENT, TOPOLOGY, 1, stream())
    assert all(torch.equal(weights.layers[0][name][2], row) for name, row in before.items())


@pytest.mark.parametrize("gone", [("scale", 1, 4), ("up.weight", 0, 0)])
def test_what_is_missing_is_listed_and_can_be_brought_later(gone):
    name, layer, expert = gone
    weights, refreshed = old_weights(), []
    weights.add_refresh(lambda layer, slots: refreshed.append((layer, slots)))
    reload = ExpertReload(weights, PLACEMENT, TOPOLOGY, 0)
    for row in stream():
        if row[:3] != (layer, name, expert):
            reload.write(*row)
    with pytest.raises(EplbError, match=rf"no \(layer, name, expert\) \[\({layer}, '{name}', {expert}\)\]"):
        reload.finish()
    assert refreshed == []
    assert reload.missing == [(layer, name, expert)]
    assert reload.write(layer, name, expert, expert_row(layer + NEW, expert, name)) == ((0, 2) if expert == 0 else (0,))
    reload.finish()
    assert refreshed == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]
    assert wrong(weights) == []


def test_a_stream_that_ends_early_is_no_reload():
    with pytest.raises(EplbError, match=r"\(0, 'down.weight', 3\).*and \d+ more"):
        reload_experts(old_weights(), PLACEMENT, TOPOLOGY, 0, stream(experts=range(3)))


def test_an_error_of_the_source_is_not_hidden_by_what_is_missing():
    def read(layer, name, expert):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        reload_experts(old_weights(), PLACEMENT, TOPOLOGY, 0, read)


def test_refreshes_see_the_slots_that_hold_experts():
    weights, refreshed = old_weights(1), []
    weights.add_refresh(lambda layer, slots: refreshed.append((layer, slots)))
    reload_experts(weights, PLACEMENT, TOPOLOGY, 1, stream())
    assert refreshed == [(0, (0, 1, 3)), (1, (0, 1, 2, 3))]


def test_some_tensors_can_be_reloaded_by_name():
    weights = old_weights()
    reload = ExpertReload(weights, PLACEMENT, TOPOLOGY, 0, names=["scale", "gate"])
    for row in stream():
        if row[1] in ("scale", "gate"):
            reload.write(*row)
    reload.finish()
    assert {name for _, _, name in wrong(weights)} == set(FIELDS) - {"scale", "gate", "empty"}
    with pytest.raises(EplbError, match=r"\(0, 'packed'\)"):
        reload.write(0, "packed", 0, expert_row(0, 0, "packed"))


def test_rows_that_require_gradients_are_values():
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    row = torch.ones(2, requires_grad=True)
    reload_experts(
        ExpertWeights([{"w": parameter}]), [[0, 0, 1, 1]], Topology(1, 4), 0, [(0, "w", 0, row), (0, "w", 1, 2 * row)]
    )
    assert parameter.tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert parameter.is_leaf


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, "up.weight", 0, torch.zeros(5, 3)), r"\(5, 3\) torch.float32 for .*rows are \(3, 5\)"),
        ((0, "up.weight", 0, torch.zeros(3, 5, dtype=torch.bfloat16)), "torch.bfloat16 for"),
        ((0, "up.weight", -1, torch.zeros(3, 5)), "must be an integer >= 0"),
        ((0, "bias", 0, torch.zeros(3)), r"\(0, 'bias'\).* 2 layers, with .*gate"),
        ((2, "gate", 0, torch.zeros(())), r"\(2, 'gate'\)"),
        ((-1, "gate", 0, torch.zeros(())), r"\(-1, 'gate'\)"),
        ((1, "gate", 4, torch.zeros(())), r"\(1, 'gate', 4\) again"),
    ],
    ids=lambda case: str(case)[:30],
)
def test_rows_that_do_not_fit_change_nothing(row, message):
    weights = old_weights()
    reload = ExpertReload(weights, PLACEMENT, TOPOLOGY, 0)
    reload.write(1, "gate", 4, torch.tensor(5.0))
    before = copy.deepcopy(weights.layers)
    with pytest.raises(EplbError, match=message):
        reload.write(*row)
    for tensors, copies in zip(weights.layers, before, strict=True):
        assert all(same_bytes(tensor, copies[name]) for name, tensor in tensors.items())


def test_a_rearrangement_that_starts_in_between_is_noticed():
    moving = []
    reload = ExpertReload(old_weights(), PLACEMENT, TOPOLOGY, 0, in_flight=lambda: bool(moving))
    rows = stream()
    for row in rows[:-1]:
        reload.write(*row)
    moving.append("one")
    with pytest.raises(EplbError, match="under way"):
        reload.write(*rows[-1])
    moving.clear()
    reload.write(*rows[-1])
    moving.append("another")
    with pytest.raises(EplbError, match="under way"):
        reload.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"physical_to_logical": PLACEMENT[:1]}, "2 layers of 4 slots for 1 of 4"),
        ({"topology": Topology(4, 2)}, "2 layers of 4 slots for 2 of 2"),
        ({"topology": Topology(3, 4)}, "12 slots"),
        ({"ep_rank": 2}, "must be an integer 0..1; got ep_rank=2"),
        ({"ep_rank": -1}, "ep_rank=-1"),
        ({"names": ["scale", "biased"]}, r"got \[biased\]. Choose from"),
        ({"in_flight": lambda: True}, "under way"),
    ],
    ids=["layers", "slots", "ranks", "ep_rank", "negative", "names", "in flight"],
)
def test_reloads_that_cannot_work_are_refused_at_the_start(options, message):
    arguments = {"weights": old_weights(), "physical_to_logical": PLACEMENT, "topology": TOPOLOGY, "ep_rank": 0}
    with pytest.raises(EplbError, match=message):
        ExpertReload(**arguments | options)
