"""A history of forwards, gates, placements and readings against a plain model."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from eplb_core import EMPTY
from eplb_torch.dispatch import DeviceMaps
from eplb_torch.dispatcher import Dispatcher

LAYERS, SLOTS, EXPERTS = 2, 6, 4
rows = st.lists(st.integers(EMPTY, EXPERTS - 1), min_size=SLOTS, max_size=SLOTS)
batches = st.lists(st.integers(-2, EXPERTS), max_size=9)


class Recording(RuleBasedStateMachine):
    @initialize(count=st.sampled_from(["slots", "experts"]), rows=st.lists(rows, min_size=LAYERS, max_size=LAYERS))
    def start(self, count, rows):
        self.count, self.enabled = count, True
        self.placement = np.asarray(rows)
        self.moe = Dispatcher(DeviceMaps(self.placement, EXPERTS, max_replicas=SLOTS), ep_rank=1, count=count)
        self.layers = [self.moe.layer(i) for i in range(LAYERS)]
        self.counted = [Counter() for _ in range(LAYERS)]
        self.epoch = [0] * LAYERS
        self.served = [Counter() for _ in range(LAYERS)]

    @rule(layer=st.integers(0, LAYERS - 1), ids=batches, unpadded=st.none() | st.integers(0, 9))
    def forward(self, layer, ids, unpadded):
        slots = self.layers[layer](torch.tensor(ids, dtype=torch.int64), unpadded=unpadded).tolist()
        for expert, slot in list(zip(ids, slots, strict=True))[:unpadded]:
            known = 0 <= expert < EXPERTS
            held = known and expert in self.placement[layer]
            assert (self.placement[layer, slot] == expert) if held else slot == EMPTY
            counted, is_counted = (slot, held) if self.count == "slots" else (expert, known)
            self.counted[layer][counted] += is_counted and self.enabled
            self.served[layer][slot] += held

    @rule(enabled=st.booleans())
    def gate(self, enabled):
        self.moe.recorder.enabled = self.enabled = enabled

    @rule(layer=st.integers(0, LAYERS - 1), row=rows, epoch=st.integers(1, 9))
    def switch(self, layer, row, epoch):
        self.placement[layer] = row
        self.moe.maps.update(self.placement[layer], layer=layer)
        self.moe.recorder.start_epoch(epoch, layer=layer)
        self.epoch[layer] = epoch
        self.counted[layer], self.served[layer] = Counter(), Counter()

    @rule()
    def take(self):
        counts, epoch = self.moe.recorder.take()
        for layer, counted in enumerate(self.counted):
            assert counts[layer].tolist() == [counted[i] for i in range(counts.shape[1])]
            counted.clear()
        assert epoch.tolist() == self.epoch

    @invariant()
    def copies_are_within_one_token_since_the_switch(self):
        for row, served in zip(getattr(self, "placement", []), getattr(self, "served", []), strict=True):
            for expert in set(row.tolist()) - {EMPTY}:
                tokens = [served[slot] for slot in np.flatnonzero(row == expert).tolist()]
                assert max(tokens) - min(tokens) <= 1


TestRecording = Recording.TestCase


@given(st.data())
def test_the_copy_that_a_rank_begins_with_is_its_own(data):
    row, ep_rank = data.draw(rows), data.draw(st.integers(0, 9))
    for expert in set(row) - {EMPTY}:
        copies = [slot for slot, held in enumerate(row) if held == expert]
        dispatch = Dispatcher(DeviceMaps([row], EXPERTS, max_replicas=SLOTS), ep_rank).layer(0)
        assert dispatch(torch.tensor([expert])).item() == copies[ep_rank % len(copies)]
