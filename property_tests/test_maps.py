"""Maps say where every expert is, in both directions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_core import EMPTY, derive_maps
from eplb_core.testing import model_slots, placement_pairs


@given(placement_pairs(empty=True), st.integers(0, 3))
def test_slots_ascend_and_are_padded(pair, extra):
    topology, num_logical, _, placement = pair
    most = max((row.tolist().count(e) for row in placement for e in range(num_logical)), default=0)
    for width in (None, most + extra + (most + extra == 0)):
        maps = derive_maps(placement, num_logical, max_replicas=width)
        expected_width = max(most, 1) if width is None else width
        assert maps.logical_to_physical.shape == (len(placement), num_logical, expected_width)
        assert {field.dtype for field in maps} == {np.dtype(np.int32)}
        assert maps.physical_to_logical.tolist() == placement.tolist()
        for layer, row in enumerate(placement.tolist()):
            slots = model_slots(row, num_logical)
            assert maps.replica_count[layer].tolist() == [len(s) for s in slots]
            padded = [s + [EMPTY] * (expected_width - len(s)) for s in slots]
            assert maps.logical_to_physical[layer].tolist() == padded


@given(placement_pairs(empty=True))
def test_one_layer_works_as_well_as_many(pair):
    _, num_logical, _, placement = pair
    many = derive_maps(placement, num_logical)
    width = many.logical_to_physical.shape[-1]
    one = derive_maps(placement[0], num_logical, max_replicas=width)
    for all_layers, single in zip(many, one, strict=True):
        assert all_layers[0].tolist() == single.tolist()
