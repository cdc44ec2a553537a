import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eplb_core import EMPTY, EplbError, derive_maps
from eplb_torch.dispatch import DeviceMaps, LayerMaps, count_tokens, mask_padding, select_slots

# Expert 0 has three copies, expert 1 one, expert 2 two.
PLACEMENT = np.asarray([[0, 1, 0, 2, 2, 0]])


def maps_of(placement=PLACEMENT, num_logical=3) -> LayerMaps:
    return DeviceMaps(placement, num_logical).layer(0)


def test_one_token_per_call_goes_to_the_copy_that_the_offset_names():
    token = torch.tensor([[0]])
    assert [select_slots(token, maps_of(), offset=rank).item() for rank in range(6)] == [0, 2, 5, 0, 2, 5]


def test_ids_of_one_token_do_not_share_a_choice():
    # The k experts of a token would all use copy 0 if the choice hung on the token alone.
    ids = torch.tensor([[0, 2, 0, 2]])
    assert select_slots(ids, maps_of()).tolist() == [[0, 3, 2, 4]]


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 3)])
def test_few_tokens_are_spread_evenly(tokens, most):
    slots = select_slots(torch.zeros(tokens, 1, dtype=torch.int64), maps_of())
    assert count_tokens(slots, 6).max() == most


def test_running_offset_evens_out_the_copies_over_calls():
    maps, load, per_slot = maps_of(), torch.zeros(3, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    ids = torch.tensor([[0, 2], [0, 1]])
    for _ in range(9):
        per_slot += count_tokens(select_slots(ids, maps, offset=load + 1), 6)
        load += count_tokens(ids, 3)
    assert load.tolist() == [18, 9, 9]
    assert per_slot.tolist() == [6, 9, 6, 4, 5, 6]


def test_padding_and_lost_experts_go_nowhere():
    maps = maps_of(np.asarray([[0, EMPTY, 0, 2]]))
    ids = torch.tensor([[0, -1], [1, 7], [2, -5]], dtype=torch.int32)
    slots = select_slots(ids, maps)
    assert slots.dtype == torch.int32
    assert slots.tolist() == [[0, EMPTY], [EMPTY, EMPTY], [3, EMPTY]]
    assert count_tokens(ids, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(0, 2), (0,), (2, 3, 4)])
def test_any_shape_is_kept(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    assert select_slots(ids, maps_of()).shape == shape
    assert count_tokens(ids, 3).sum() == ids.numel()


def test_counts_beyond_float32_stay_exact():
    load = torch.full((3,), 2**53, dtype=torch.int64)
    load += count_tokens(torch.tensor([0, 0, 2]), 3)
    assert load.tolist() == [2**53 + 2, 2**53, 2**53 + 1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    maps, load = maps_of(), torch.tensor([4, 0, 1])

    def both(ids, offset):
        return select_slots(ids, maps, offset=offset), count_tokens(ids, 3)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (1, 5, 8):
        ids = torch.arange(tokens * 2).reshape(tokens, 2) % 4 - 1
        for got, expected in zip(compiled(ids, load), both(ids, load), strict=True):
            assert torch.equal(got, expected)


def test_updates_reach_views_and_keep_addresses():
    placement = np.asarray([[0, 1, 2, 0], [0, 1, 2, 1]])
    maps = DeviceMaps(placement, num_logical=3)
    views, addresses = maps.layer(1), [maps.logical_to_physical.data_ptr(), maps.replica_count.data_ptr()]
    before = [tensor.clone() for tensor in maps.layer(0)]
    maps.update(np.asarray([2, 1, 2, 0]), layer=1)
    assert views.logical_to_physical.tolist() == [[3, EMPTY], [1, EMPTY], [0, 2]]
    assert views.replica_count.tolist() == [1, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(maps.layer(0), before, strict=True))
    maps.update(placement)
    assert views.replica_count.tolist() == [1, 2, 1]
    assert [maps.logical_to_physical.data_ptr(), maps.replica_count.data_ptr()] == addresses


@pytest.mark.parametrize(
    ("placement", "layer", "message"),
    [
        ([0, 1, 2, 0], None, r"shape \(2, 4\)"),
        ([[0, 1, 2, 0]], 0, r"shape \(4,\)"),
        ([0, 1, 2, 3], 0, "num_logical=3"),
        ([0, 0, 0, 2], 0, "most copies=3"),
    ],
)
def test_refused_updates_change_nothing(placement, layer, message):
    maps = DeviceMaps(np.asarray([[0, 1, 2, 0], [0, 1, 2, 1]]), num_logical=3)
    before = maps.logical_to_physical.clone()
    with pytest.raises(EplbError, match=message):
        maps.update(np.asarray(placement), layer=layer)
    assert torch.equal(maps.logical_to_physical, before)


def test_maps_of_one_layer_need_a_layer_axis():
    with pytest.raises(EplbError, match="layer axis|leading axis"):
        DeviceMaps(np.asarray([0, 1, 2]), num_logical=3)


def test_maps_straight_from_the_core_do_as_well():
    ids = torch.tensor([[0, 2], [2, -1], [2, 1]])
    placement = np.asarray([[0, 2, 1, 2], [2, 1, 0, 0]])
    for layer in range(2):
        from_core = select_slots(ids, derive_maps(placement[layer], num_logical=3))
        assert from_core.tolist() == select_slots(ids, DeviceMaps(placement, 3).layer(layer)).tolist()


def test_copies_take_their_shares():
    maps = DeviceMaps(PLACEMENT, 3, shares=[[5, 1, 2, 0, 3, 1]]).layer(0)
    slots = select_slots(torch.tensor([0] * 80 + [2] * 7), maps)
    assert count_tokens(slots, 6).tolist() == [50, 0, 20, 0, 7, 10]


def test_shares_can_change_while_the_placement_stays():
    maps = DeviceMaps(PLACEMENT, 3, max_replicas=8)
    view, address = maps.layer(0), maps.logical_to_physical.data_ptr()
    ids = torch.zeros(12, dtype=torch.int64)
    assert count_tokens(select_slots(ids, view), 6).tolist() == [4, 0, 4, 0, 0, 4]
    maps.update(PLACEMENT[0], layer=0, shares=[4, 1, 1, 1, 1, 1])
    assert count_tokens(select_slots(ids, view), 6).tolist() == [8, 0, 2, 0, 0, 2]
    maps.update(PLACEMENT)
    assert count_tokens(select_slots(ids, view), 6).tolist() == [4, 0, 4, 0, 0, 4]
    assert maps.logical_to_physical.data_ptr() == address


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([[1, 1, 1, 1, 1]], r"shape=\(1, 5\)"),
        ([1, 1, 1, 1, 1, 1], r"shape=\(6,\)"),
        ([[9, 1, 9, 1, 1, 1]], "max_turns=8"),
        ([[0, 1, 0, 1, 1, 0]], r"\(layer, expert\) \[\(0, 0\)\]"),
    ],
)
def test_refused_shares_change_nothing(shares, message):
    maps = DeviceMaps(PLACEMENT, 3, max_replicas=8)
    before = maps.logical_to_physical.clone()
    with pytest.raises(EplbError, match=message):
        maps.update(PLACEMENT, shares=shares)
    assert torch.equal(maps.logical_to_physical, before)


def test_maps_with_shares_have_room_for_the_default_resolution():
    assert DeviceMaps(PLACEMENT, 3, shares=[[1, 1, 1, 1, 1, 1]]).max_replicas == 64
    assert DeviceMaps(PLACEMENT, 3).max_replicas == 4


IDS = torch.tensor([[0, 2], [2, 1], [0, 1]])


@pytest.mark.parametrize(
    "unpadded",
    [2, torch.tensor(2), torch.tensor([2], dtype=torch.int32), torch.tensor([True, True, False])],
    ids=["int", "scalar", "one element", "mask"],
)
def test_padding_is_sent_nowhere(unpadded):
    assert select_slots(IDS, maps_of(), unpadded=unpadded).tolist() == [[0, 3], [4, 1], [EMPTY, EMPTY]]
    assert count_tokens(mask_padding(IDS, unpadded), 3).tolist() == [1, 1, 2]


def test_a_mask_may_have_more_dimensions():
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    assert mask_padding(IDS, mask).tolist() == [[0, EMPTY], [EMPTY, EMPTY], [0, 1]]
    batch = IDS.reshape(1, 3, 2)
    assert mask_padding(batch, torch.tensor([[False, True, True]])).tolist() == [[[EMPTY, EMPTY], [2, 1], [0, 1]]]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_count_of_none_or_all_tokens_is_fine(count):
    assert mask_padding(IDS, count).tolist() == (IDS.tolist() if count else [[EMPTY, EMPTY]] * 3)


@pytest.mark.parametrize(
    "unpadded",
    [
        torch.tensor([2.0]),
        torch.tensor([1, 2]),
        torch.tensor([True, False]),
        torch.ones((3, 2, 1), dtype=torch.bool),
        1.5,
        "all",
    ],
    ids=str,
)
def test_masks_that_do_not_fit_are_refused(unpadded):
    with pytest.raises(EplbError, match=r"`unpadded` must be .* got .* for ids of shape \(3, 2\)"):
        select_slots(IDS, maps_of(), unpadded=unpadded)


def test_a_number_of_leading_tokens_needs_a_leading_dimension():
    with pytest.raises(EplbError, match=r"ids of shape \(\)"):
        mask_padding(torch.tensor(1), 1)


def test_fake_and_meta_tensors_keep_shape_and_dtype():
    with FakeTensorMode():
        maps = LayerMaps(torch.zeros((3, 4), dtype=torch.int32), torch.ones(3, dtype=torch.int32))
        slots = select_slots(torch.zeros((5, 2), dtype=torch.int32), maps, unpadded=torch.tensor(3))
    assert (slots.shape, slots.dtype) == ((5, 2), torch.int32)
    meta = LayerMaps(*(tensor.to("meta") for tensor in maps_of()))
    slots = select_slots(torch.zeros((5, 2), dtype=torch.int64, device="meta"), meta, offset=3)
    assert (slots.shape, slots.dtype, slots.is_meta) == ((5, 2), torch.int64, True)
