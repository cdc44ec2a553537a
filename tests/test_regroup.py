"""Models that become part of another group: maps, weights and the forward go along; memory stays where it can."""

import copy

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from eplb_core import EMPTY, EplbError, Topology, round_robin
from eplb_torch import DeviceMaps, ExpertWeights, LiveModel, RearrangeError
from eplb_torch.balancer.mover import Mover, Moves
from eplb_torch.elastic.groups import form_group
from eplb_torch.integrations.huggingface import expert_parallel, joining_experts
from tests.expert_rows import expert_layers
from tests.tiny_moe import tiny_model

BEFORE = np.asarray([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
AFTER = np.asarray([[0, 1, 3, 2], [3, 2, 0, 1]])
WITH_LOST = np.asarray([[0, 1, EMPTY, 2], [3, 3, 0, 1]])


def table(maps, layer):
    return [sorted(slot for slot in row if slot != EMPTY) for row in maps.layer(layer).logical_to_physical.tolist()]


def test_maps_take_a_placement_of_another_size_in_place():
    maps = DeviceMaps(BEFORE, 4)
    view, address = maps.layer(1), maps.logical_to_physical.data_ptr()
    maps.resize(AFTER)
    assert (maps.num_slots, maps.max_replicas, maps.logical_to_physical.data_ptr()) == (4, 3, address)
    assert table(maps, 0) == [[0], [1], [3], [2]]
    assert view.replica_count.tolist() == [1, 1, 1, 1]
    maps.resize(WITH_LOST)
    assert table(maps, 0) == [[0], [1], [3], []]
    assert view.logical_to_physical[3].tolist() == [0, 1, EMPTY]
    with pytest.raises(EplbError, match="shape"):
        maps.update(BEFORE)
    for bad in (AFTER[:1], AFTER + 2):
        with pytest.raises(EplbError):
            maps.resize(bad)
        assert (maps.num_slots, table(maps, 0)) == (4, [[0], [1], [3], []])


@pytest.mark.parametrize(("given", "width"), [(None, 5), (2, 3)])
def test_maps_grow_as_wide_as_later_placements_need(given, width):
    maps = DeviceMaps(AFTER, 4, max_replicas=given)
    wide = np.asarray([[0, 1, 2, 3, 0, 1, 2, 0], [3, 2, 1, 0, 3, 2, 1, 0]])
    maps.resize(wide)
    assert maps.max_replicas == width
    assert table(maps, 0)[0] == [0, 4, 7]
    maps.update(np.roll(wide, 1, axis=1))
    assert table(maps, 0)[0] == [0, 1, 5]


def live():
    topology = Topology(3, 2)
    weights = ExpertWeights(expert_layers(BEFORE, topology, 0))
    return LiveModel(weights, DeviceMaps(BEFORE, 4), topology, BEFORE)


def test_a_live_model_takes_its_slots_along():
    model = live()
    model.regroup(WITH_LOST, Topology(2, 2))
    assert model.topology == Topology(2, 2)
    np.testing.assert_array_equal(model.placement, WITH_LOST)
    assert table(model.maps, 1) == [[2], [3], [], [0, 1]]
    model.commit(AFTER)
    with pytest.raises(EplbError, match="no copy"):
        model.commit(WITH_LOST)
    with pytest.raises(EplbError, match="2 layers of 1 slots for 2 of 2"):
        model.regroup(AFTER, Topology(4, 1))
    with pytest.raises(EplbError, match="cannot allocate the engine's tensors; got slots_per_rank=3, present 2"):
        model.resize(3)


def test_weights_are_replaced_by_others_of_the_same_experts():
    model, calls = live(), []
    model.weights.add_refresh(lambda layer, slots: calls.append((layer, slots)))
    larger = ExpertWeights(expert_layers(np.concatenate([BEFORE, BEFORE], axis=1), Topology(2, 6), 0)).layers
    weights = model.weights.replaced(larger)
    assert weights.slots_per_rank == 6
    weights.refresh(1, (5,))
    assert calls == [(1, (5,))]
    with pytest.raises(EplbError, match="same tensors"):
        model.weights.replaced([{"up": torch.zeros(3)} for _ in range(2)])


@torch.no_grad()
def test_a_hugging_face_model_serves_in_one_group_after_another():
    model = tiny_model("qwen3_moe")
    reference, ids = copy.deepcopy(model), torch.arange(7)[None]
    first, second = (form_group(HashStore(), 0, 1, 5.0) for _ in range(2))
    experts = expert_parallel(model, Topology(1, 10), group=first)
    addresses = [tensor.data_ptr() for layer in experts.weights.layers for tensor in layer.values()]
    np.testing.assert_allclose(model(ids).logits, reference(ids).logits, atol=1e-5)
    experts.regroup(experts.placement, Topology(1, 10), second)
    assert experts.group is second
    assert [tensor.data_ptr() for layer in experts.weights.layers for tensor in layer.values()] == addresses
    np.testing.assert_allclose(model(ids).logits, reference(ids).logits, atol=1e-5)
    with pytest.raises(EplbError, match="ep_size=2, group size=1"):
        experts.regroup(np.tile(experts.placement, 2), Topology(2, 10), second)

    calls = []
    experts.weights.add_refresh(lambda layer, slots: calls.append(layer))
    experts.resize(12)
    with pytest.raises(EplbError, match="copy of every expert"):
        model(ids)
    wider = np.pad(experts.placement, ((0, 0), (0, 2)), constant_values=EMPTY)
    experts.regroup(wider, Topology(1, 12), second)
    for name, layer in zip(experts.layer_names, experts.weights.layers, strict=True):
        assert all(getattr(model.get_submodule(name), key) is tensor for key, tensor in layer.items())
        assert all(len(tensor) == 12 and not tensor[10:].any() for tensor in layer.values())
    np.testing.assert_allclose(model(ids).logits, reference(ids).logits, atol=1e-5)
    experts.weights.refresh(0, (1,))
    assert calls == [0]
    with pytest.raises(EplbError, match="present 12"):
        experts.resize(11)

    lost = wider.copy()
    lost[0, (lost[0] == 3).nonzero()] = EMPTY
    experts.regroup(lost, Topology(1, 12), second)
    with pytest.raises(EplbError, match="copy of every expert"):
        model(ids)
    experts.commit(wider[1], layer=1)
    assert not experts.is_whole
    experts.commit(wider[0], layer=0)
    np.testing.assert_allclose(model(ids).logits, reference(ids).logits, atol=1e-5)


@pytest.mark.parametrize("meta", [False, True])
@torch.no_grad()
def test_a_joining_model_holds_nothing_and_refuses_to_run_until_it_does(meta):
    model, ids = tiny_model("qwen3_moe"), torch.arange(5)[None]
    expected, whole = model(ids).logits, model.state_dict()
    for name, module in model.named_modules():
        if meta and name.endswith("experts"):
            module.to_empty(device="meta")
    experts = joining_experts(model, 9)
    assert (experts.placement == EMPTY).all()
    assert experts.placement.shape == (2, 9)
    for layer in experts.weights.layers:
        assert all(len(tensor) == 9 and not tensor.any() and tensor.device.type == "cpu" for tensor in layer.values())
    with pytest.raises(EplbError, match="copy of every expert"):
        model(ids)
    placement = round_robin(2, 8, Topology(1, 9))
    experts.regroup(np.full((2, 9), EMPTY), Topology(1, 9), form_group(HashStore(), 0, 1, 5.0))
    for layer, name in enumerate(experts.layer_names):
        for key, tensor in experts.weights.layers[layer].items():
            tensor.copy_(whole[f"{name}.{key}"][placement[layer].tolist()])
    experts.commit(placement)
    np.testing.assert_allclose(model(ids).logits, expected, atol=1e-5)


def test_what_was_confirmed_before_a_drain_failed_is_told():
    """The placement that a failing drain leaves must reach the maps: weights hold it."""
    moves = Moves("main", None, BEFORE, BEFORE[:, ::-1], 0)

    class Failing:
        def drain(self):
            raise RearrangeError((1,), (0,), lost_ranks=(2,))

        def placement(self, old, new):
            return np.where([[False], [True]], new, old)

    mover = Mover({}, None, None)
    mover._moves, mover._rearrangement = moves, Failing()
    progress = mover.drain(0)
    assert next(progress).placement.tolist() == [BEFORE[0].tolist(), BEFORE[1, ::-1].tolist()]
    with pytest.raises(RearrangeError):
        next(progress)
