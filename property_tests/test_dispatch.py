import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY
from eplb_torch.dispatch import DeviceMaps, count_tokens, select_slots


@st.composite
def dispatches(draw):
    """A placement of one layer `[slots]` (experts may be lost), its size, and a batch of ids with padding."""
    num_logical = draw(st.integers(1, 8))
    num_slots = draw(st.integers(1, 16))
    slots = st.integers(EMPTY, num_logical - 1)
    placement = np.asarray(draw(st.lists(slots, min_size=num_slots, max_size=num_slots)))
    tokens, k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    ids = st.integers(-2, num_logical)
    batch = draw(st.lists(ids, min_size=tokens * k, max_size=tokens * k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return placement, num_logical, torch.tensor(batch, dtype=dtype).reshape(tokens, k)


def layer_maps(placement, num_logical):
    return DeviceMaps(placement[None], num_logical, max_replicas=len(placement)).layer(0)


offsets = st.integers(0, 2**40)


@given(dispatches(), offsets)
def test_each_id_gets_a_slot_that_holds_its_expert(case, offset):
    placement, num_logical, ids = case
    slots = select_slots(ids, layer_maps(placement, num_logical), offset=offset)
    assert slots.shape == ids.shape
    assert slots.dtype == ids.dtype
    for slot, expert in zip(slots.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if 0 <= expert < num_logical and expert in placement:
            assert placement[slot] == expert
        else:
            assert slot == EMPTY


@given(dispatches(), offsets)
def test_copies_of_an_expert_differ_by_at_most_one_token(case, offset):
    placement, num_logical, ids = case
    slots = select_slots(ids, layer_maps(placement, num_logical), offset=offset)
    tokens = np.bincount(slots.flatten().numpy() + 1, minlength=len(placement) + 1)[1:]
    for expert in set(placement.tolist()) - {EMPTY}:
        copies = tokens[placement == expert]
        assert copies.max() - copies.min() <= 1


@given(dispatches(), st.integers(0, 7), st.integers(1, 5))
def test_a_running_offset_keeps_them_within_one_over_many_calls(case, ep_rank, calls):
    placement, num_logical, ids = case
    maps, load = layer_maps(placement, num_logical), torch.zeros(num_logical, dtype=torch.int64)
    tokens = torch.zeros(len(placement), dtype=torch.int64)
    for call in range(calls):
        part = ids[call:]
        tokens += count_tokens(select_slots(part, maps, offset=load + ep_rank), len(placement))
        load += count_tokens(part, num_logical)
    for expert in set(placement.tolist()) - {EMPTY}:
        copies = tokens.numpy()[placement == expert]
        assert copies.max() - copies.min() <= 1


@given(dispatches())
def test_an_offset_names_the_copy_that_comes_first(case):
    placement, num_logical, _ = case
    maps = layer_maps(placement, num_logical)
    for expert in set(placement.tolist()) - {EMPTY}:
        copies = np.flatnonzero(placement == expert)
        for offset in range(2 * len(copies)):
            slot = select_slots(torch.tensor([expert]), maps, offset=offset).item()
            assert slot == copies[offset % len(copies)]


@given(dispatches())
def test_counts_equal_bincount(case):
    _, num_logical, ids = case
    valid = ids[(ids >= 0) & (ids < num_logical)].numpy()
    counts = count_tokens(ids, num_logical)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts, np.bincount(valid, minlength=num_logical))


@given(dispatches(), st.data())
def test_a_vector_of_offsets_is_one_offset_per_expert(case, data):
    placement, num_logical, ids = case
    maps = layer_maps(placement, num_logical)
    values = data.draw(st.lists(offsets, min_size=num_logical, max_size=num_logical))
    slots = select_slots(ids, maps, offset=torch.tensor(values))
    for expert, offset in enumerate(values):
        chosen = ids == expert
        alone = select_slots(torch.where(chosen, ids, EMPTY), maps, offset=offset)
        assert torch.equal(slots[chosen], alone[chosen])


@given(dispatches(), offsets)
def test_inputs_are_not_written_and_the_result_repeats(case, offset):
    placement, num_logical, ids = case
    maps, before = layer_maps(placement, num_logical), ids.clone()
    assert torch.equal(select_slots(ids, maps, offset=offset), select_slots(ids, maps, offset=offset))
    assert torch.equal(ids, before)


@st.composite
def weighted(draw):
    """A dispatch, and a share for each slot of its placement that leaves no expert with copies without one."""
    placement, num_logical, ids = draw(dispatches())
    shares = draw(st.lists(st.integers(0, 9), min_size=len(placement), max_size=len(placement)))
    shares = np.where(placement == EMPTY, 0, shares)
    for expert in set(placement.tolist()) - {EMPTY}:
        copies = np.flatnonzero(placement == expert)
        shares[copies[0]] += not shares[copies].any()
    return placement, num_logical, ids, shares


@given(weighted(), st.integers(0, 50))
def test_copies_get_their_shares_within_one_token_or_two(case, offset):
    placement, num_logical, ids, shares = case
    maps = DeviceMaps(placement[None], num_logical, max_replicas=150, shares=shares[None]).layer(0)
    tokens = count_tokens(select_slots(ids, maps, offset=offset), len(placement)).numpy()
    for expert, total in enumerate(count_tokens(ids, num_logical).tolist()):
        copies = placement == expert
        if copies.any():
            exact = shares[copies] * (total / shares[copies].sum())
            assert tokens[copies].sum() == total
            assert np.abs(tokens[copies] - exact).max() < (2 if offset else 1)


@given(dispatches(), offsets, st.data())
def test_padding_makes_no_difference_to_other_tokens(case, offset, data):
    placement, num_logical, ids = case
    maps = layer_maps(placement, num_logical)
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=torch.bool)
    slots = select_slots(ids, maps, offset=offset, unpadded=real)
    assert torch.equal(slots[real], select_slots(ids[real], maps, offset=offset))
    assert (slots[~real] == EMPTY).all()


@given(dispatches(), offsets, st.data())
def test_a_count_of_unpadded_tokens_is_a_mask_of_the_leading_ones(case, offset, data):
    placement, num_logical, ids = case
    maps, count = layer_maps(placement, num_logical), data.draw(st.integers(0, len(ids)))
    slots = select_slots(ids, maps, offset=offset, unpadded=torch.tensor(count))
    assert torch.equal(slots, select_slots(ids, maps, offset=offset, unpadded=torch.arange(len(ids)) < count))
    assert torch.equal(slots[:count], select_slots(ids[:count], maps, offset=offset))
