"""What may be registered as expert weights, and how rows are packed."""

import pytest
import torch

from eplb_core import EplbError
from eplb_torch import ExpertWeights
from eplb_torch.staging import Staging
from eplb_torch.transaction.checksum import checksum_rows
from eplb_torch.transaction.parcel import Parcel, WireFormat, copy_rows
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


def experts_module(**attributes) -> torch.nn.Module:
    module = torch.nn.Module()
    module.up = torch.nn.Parameter(torch.zeros(3, 4, 2))
    module.register_buffer("scale", torch.ones(3))
    for name, value in attributes.items():
        setattr(module, name, value)
    return torch.nn.ModuleDict({"moe": module})


def test_from_module_finds_parameters_buffers_and_plain_attributes():
    inner = torch.nn.Module()
    inner.alpha = torch.ones(3, 2)
    model = experts_module(kernel=inner, tables=[torch.zeros(3), {"b": torch.zeros(3, 1)}])
    weights = ExpertWeights.from_module(model, ["moe"], slots_per_rank=3)
    assert sorted(weights.layers[0]) == ["kernel.alpha", "scale", "tables.0", "tables.1.b", "up"]
    assert weights.layers[0]["up"] is model["moe"].up


FORGOTTEN = {
    "a scale of another shape": ({"odd": torch.zeros(1)}, {}, r"moe\.odd \(1,\)"),
    "a transposed tensor": ({"down": torch.nn.Parameter(torch.zeros(2, 3))}, {}, r"moe\.down \(2, 3\)"),
    "a scalar": ({"step": torch.tensor(1.0)}, {}, r"moe\.step \(\)"),
    "a wrong exclusion": ({}, {"exclude": ["sclae"]}, r"\[sclae\], which match none"),
    "no such layer": ({}, {"layers": ["mo"]}, r"no module at \[mo\]"),
}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_from_module_refuses_what_it_cannot_place(case):
    attributes, options, message = FORGOTTEN[case]
    options = {"layers": ["moe"], "slots_per_rank": 3, **options}
    with pytest.raises(EplbError, match=message):
        ExpertWeights.from_module(experts_module(**attributes), **options)


def test_from_module_leaves_out_what_is_excluded():
    model = experts_module(norm_weight=torch.zeros(7), norm_bias=torch.zeros(7))
    weights = ExpertWeights.from_module(model, ["moe"], slots_per_rank=3, exclude=["norm_*"])
    assert sorted(weights.layers[0]) == ["scale", "up"]


def test_expanded_tensors_are_refused():
    with pytest.raises(EplbError, match=r"strides \(0, 1\)"):
        ExpertWeights([{"w": torch.zeros(1, 4).expand(3, 4)}])


def test_tensors_on_the_meta_device_are_refused():
    with pytest.raises(EplbError, match="one real device"):
        ExpertWeights([{"w": torch.zeros(3, 4), "scale": torch.zeros(3, device="meta")}])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_notices_every_changed_byte_and_swapped_values(dtype):
    row = torch.arange(24, dtype=torch.uint8).view(dtype)
    whole = checksum_rows([[row, row.clone()]], row.device)
    for i in range(24):
        damaged = row.clone()
        damaged.view(torch.uint8)[i] ^= 1 << (i % 8)
        assert not torch.equal(checksum_rows([[damaged, row]], row.device), whole)
        assert not torch.equal(checksum_rows([[row, damaged]], row.device), whole)
    assert not torch.equal(checksum_rows([[row.flip(0), row]], row.device), whole)
    assert torch.equal(checksum_rows([[row, row], [row]], row.device)[:1], whole)
