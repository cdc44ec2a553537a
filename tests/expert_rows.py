"""Experts whose every byte says which layer, expert and tensor it belongs to."""

import torch
from torch import Tensor

FIELDS = {
    "up.weight": ((3, 5), torch.float32),
    "down.weight": ((5, 3), torch.bfloat16),
    "packed": ((7,), torch.uint8),
    "scale": ((2, 2), torch.float8_e4m3fn),
    "gate": ((), torch.float32),
    "empty": ((0, 4), torch.float32),
}


def expert_row(layer: int, expert: int, name: str) -> Tensor:
    """One tensor of one expert: random bytes that depend on layer, expert and name."""
    shape, dtype = FIELDS[name]
    seed = (layer * 4099 + expert) * 31 + sorted(FIELDS).index(name)
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 4).to(dtype)
    return torch.randint(0, 256, shape, generator=generator).to(dtype)


def expert_layers(placement, topology, rank: int) -> list[dict[str, Tensor]]:
    """The tensors of one rank under a placement; `EMPTY` slots hold zeros.

    `down.weight` is stored transposed, so that its rows are not contiguous.
    """
    slots = slice(rank * topology.slots_per_rank, (rank + 1) * topology.slots_per_rank)
    layers = []
    for layer, row in enumerate(placement[:, slots].tolist()):
        tensors = {}
        for name, (shape, dtype) in FIELDS.items():
            empty = torch.zeros(shape, dtype=dtype)
            tensors[name] = torch.stack([expert_row(layer, e, name) if e >= 0 else empty for e in row])
        tensors["down.weight"] = tensors["down.weight"].mT.contiguous().mT
        layers.append(tensors)
    return layers


def wrong_rows(layers: list[dict[str, Tensor]], placement, topology, rank: int) -> list[tuple]:
    """The (layer, slot, name) whose bytes are not those of the expert that the placement puts there."""
    wrong = []
    for layer, tensors in enumerate(layers):
        for local in range(topology.slots_per_rank):
            expert = int(placement[layer, rank * topology.slots_per_rank + local])
            for name, tensor in tensors.items():
                if expert >= 0 and not same_bytes(tensor[local], expert_row(layer, expert, name)):
                    wrong.append((layer, rank * topology.slots_per_rank + local, name))
    return wrong


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal bit by bit, NaNs included."""
    a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)
