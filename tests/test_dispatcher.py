"""Recording and dispatch of all layers, and both under torch.compile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from eplb_core import EMPTY, EplbError
from eplb_torch.dispatch import DeviceMaps
from eplb_torch.dispatcher import Dispatcher
from eplb_torch.recording import LoadRecorder

# Two layers of five slots and three experts.
PLACEMENT = np.asarray([[0, 1, 0, 2, 2], [2, 1, 1, 0, 1]])
IDS = torch.tensor([[0, 2], [2, 1], [0, 1]])


def dispatcher(**options) -> Dispatcher:
    return Dispatcher(DeviceMaps(PLACEMENT, 3, max_replicas=8), ep_rank=0, **options)


def test_slots_are_counted_layer_by_layer():
    moe = dispatcher()
    assert moe.layer(0)(IDS).tolist() == [[0, 3], [4, 1], [2, 1]]
    moe.layer(1)(IDS, unpadded=2)
    assert moe.recorder.take().counts.tolist() == [[1, 2, 1, 1, 1], [2, 1, 0, 1, 0]]
    assert moe.recorder.take().counts.tolist() == [[0] * 5, [0] * 5]


def test_experts_are_counted_even_when_they_are_lost():
    moe = Dispatcher(DeviceMaps([[0, EMPTY, 2]], 3), ep_rank=0, count="experts")
    assert moe.layer(0)(IDS).tolist() == [[0, 2], [2, EMPTY], [0, EMPTY]]
    assert moe.recorder.take().counts.tolist() == [[2, 2, 2]]


def test_ranks_begin_with_different_copies_and_take_turns_over_calls():
    token = torch.tensor([[1]])
    maps = DeviceMaps(PLACEMENT, 3)
    by_rank = [Dispatcher(maps, ep_rank=rank).layer(1) for rank in range(3)]
    assert [[dispatch(token).item() for _ in range(4)] for dispatch in by_rank] == [
        [1, 2, 4, 1],
        [2, 4, 1, 2],
        [4, 1, 2, 4],
    ]


def test_turns_go_on_while_nothing_is_recorded():
    moe = dispatcher(enabled=False)
    dispatch, token = moe.layer(1), torch.tensor([[1]])
    assert [dispatch(token).item() for _ in range(3)] == [1, 2, 4]
    assert moe.recorder.take().counts.sum() == 0


def test_the_gate_switches_recording():
    moe = dispatcher()
    dispatch = moe.layer(0)
    for enabled in (True, False, False, True):
        moe.recorder.enabled = enabled
        assert moe.recorder.enabled is enabled
        dispatch(IDS)
    assert moe.recorder.take().counts.sum() == 2 * IDS.numel()


def test_counts_of_two_placements_never_mix():
    moe = dispatcher()
    moe.layer(0)(IDS)
    moe.layer(1)(IDS)
    moe.maps.update([2, 0, 1, 1, 2], layer=1)
    moe.recorder.start_epoch(7, layer=1)
    moe.layer(1)(IDS)
    counts, epoch = moe.recorder.take()
    assert epoch.tolist() == [0, 7]
    assert counts.tolist() == [[1, 2, 1, 1, 1], [1, 2, 1, 1, 1]]
    moe.recorder.start_epoch(8)
    assert moe.recorder.take().epoch.tolist() == [8, 8]
    assert epoch.tolist() == [0, 7]


def test_taking_keeps_addresses_and_allocates_nothing():
    recorder = LoadRecorder(2, 5)
    view = recorder.layer(1)
    addresses = [recorder.counts.data_ptr(), recorder.gate.data_ptr(), view.counts.data_ptr()]
    first = recorder.take().counts
    view.record(torch.tensor([1, 1, 9, EMPTY]))
    second = recorder.take().counts
    assert first.data_ptr() == second.data_ptr() != recorder.counts.data_ptr()
    assert second.tolist() == [[0] * 5, [0, 2, 0, 0, 0]]
    recorder.enabled = False
    recorder.start_epoch(1)
    assert [recorder.counts.data_ptr(), recorder.gate.data_ptr(), view.counts.data_ptr()] == addresses


def test_counts_stay_exact_beyond_32_bits():
    recorder = LoadRecorder(1, 2)
    recorder.layer(0).add(torch.tensor([2**40, 2**53 + 1]))
    recorder.layer(0).record(torch.tensor([0, 1]))
    assert recorder.take().counts.tolist() == [[2**40 + 1, 2**53 + 2]]


def test_unknown_counts_are_refused():
    with pytest.raises(EplbError, match="count='tokens'"):
        dispatcher(count="tokens")


def test_a_compiled_model_is_compiled_once_and_sees_every_change():
    """One graph serves both layers, open and closed gates, other placements, shares and paddings."""
    compiled, plain = dispatcher(), dispatcher()
    counter = CompileCounterWithBackend("aot_eager")

    def forward(dispatch, ids, unpadded):
        return dispatch(ids, unpadded=unpadded) + 0

    run = torch.compile(forward, fullgraph=True, backend=counter)
    unpadded = torch.tensor(0)
    for step in range(6):
        for moe in (compiled, plain):
            if step == 2:
                moe.recorder.enabled = False
            if step == 3:
                moe.recorder.enabled = True
                moe.maps.update(PLACEMENT[::-1].copy())
                moe.recorder.start_epoch(1)
            if step == 5:
                moe.maps.update(PLACEMENT[1], layer=0, shares=[1, 5, 2, 1, 1])
        unpadded.fill_(step)
        for layer in range(2):
            got = run(compiled.layer(layer), IDS, unpadded)
            assert got.tolist() == forward(plain.layer(layer), IDS, unpadded).tolist()
    assert counter.frame_count == 1
    assert compiled.recorder.take().counts.tolist() == plain.recorder.take().counts.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_slots_and_counts():
    compiled, plain = dispatcher(), dispatcher()
    run = torch.compile(compiled.layer(1).__call__, fullgraph=True)
    for _ in range(3):
        assert torch.equal(run(IDS), plain.layer(1)(IDS))
    assert torch.equal(compiled.recorder.counts, plain.recorder.counts)


def test_the_documented_example_prints_what_the_page_says():
    page = (Path(__file__).parents[1] / "docs" / "dispatch.md").read_text(encoding="utf-8")
    ((code, output),) = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == output
