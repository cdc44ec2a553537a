"""What may be registered as expert weights, and how rows are packed."""

import pytest
import torch

from eplb_core import EplbError
from eplb_torch import ExpertWeights
from eplb_torch.parcel import Parcel, WireFormat, copy_rows
from eplb_torch.staging import Staging
from tests.expert_rows import FIELDS, same_bytes


def test_rows_survive_parcels_bit_by_bit():
    tensors = {
        name: (torch.randn(3, *shape) * 4).to(dtype) if dtype.is_floating_point else torch.ones(3, *shape, dtype=dtype)
        for name, (shape, dtype) in FIELDS.items()
    }
    tensors["down.weight"] = tensors["down.weight"].mT.contiguous().mT
    tensors["sliced"] = torch.randn(3, 2, 8)[:, :, 1::2]
    for direct_bytes in (1, 30, 2**20):
        for checksum in (False, True):
            layer = {name: tensor.clone() for name, tensor in tensors.items()}
            layer["down.weight"] = layer["down.weight"].mT.contiguous().mT
            weights = ExpertWeights([layer])
            parcel = Parcel(weights, [0, 0], WireFormat(direct_bytes, checksum))
            sender, receiver = Staging(weights.device), Staging(weights.device)
            sender.require(parcel.packed_bytes + 16)
            receiver.require(parcel.num_bytes + 16)
            rows = weights.rows(0)
            sent = parcel.send_from([[views[slot] for views in rows] for slot in (2, 1)], sender)
            buffers, arrival = parcel.receive_into(receiver)
            for message, buffer in zip(sent, buffers, strict=True):
                buffer.copy_(message)
            assert arrival.damaged() == []
            copy_rows([views[0] for views in rows], arrival.rows[0])
            for name, tensor in layer.items():
                assert same_bytes(tensor[0], tensors[name][2])
                assert same_bytes(tensor[1:], tensors[name][1:])


def test_parameters_are_written_in_place():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    address = parameter.data_ptr()
    (rows,) = ExpertWeights([{"w": parameter}]).rows(0)
    copy_rows([rows[0]], [rows[2]])
    assert parameter.tolist() == [[4, 5], [2, 3], [4, 5]]
    assert parameter.data_ptr() == address


REFUSED = {
    "nothing": ([], "at least one tensor in every layer"),
    "an empty layer": ([{"w": torch.zeros(2)}, {}], r"tensors per layer \[1, 0\]"),
    "a scalar": ([{"w": torch.zeros(2), "s": torch.tensor(1.0)}], r"without dimensions at .*'s'"),
    "another number of slots": ([{"w": torch.zeros(2), "s": torch.zeros(3)}], r"slots_per_rank=2 .*'s', \(3,\)"),
    "no slots": ([{"w": torch.zeros(0, 4)}], r"slots_per_rank=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    layers, message = REFUSED[case]
    with pytest.raises(EplbError, match=message):
        ExpertWeights(layers)


def test_a_tensor_registered_twice_is_refused():
    tensor = torch.zeros(2, 3)
    with pytest.raises(EplbError, match=r"\(0, 'a'\) and \(1, 'b'\) start at the same address"):
        ExpertWeights([{"a": tensor}, {"b": tensor}])


def test_layout_names_all_that_must_agree():
    one = ExpertWeights([{"w": torch.zeros(2, 3)}]).layout()
    assert one == ExpertWeights([{"w": torch.ones(4, 3)}]).layout()
    for other in ({"v": torch.zeros(2, 3)}, {"w": torch.zeros(2, 4)}, {"w": torch.zeros(2, 3).half()}):
        assert one != ExpertWeights([other]).layout()
