"""Send tokens to the ranks that hold their slots, run the experts there, bring the results back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from eplb_core import EMPTY, Topology
from eplb_core._checks import require
from eplb_torch.dispatch import count_tokens

Group = dist.ProcessGroup | None

RunSlots = Callable[[Tensor, Tensor], Tensor]
"""`(rows [n, hidden], local_slots [n]) -> [n, hidden]`: each row through the expert in its slot, unweighted."""


class _Route(NamedTuple):
    """Who sends how many rows to whom in one call.

    order: `[rows sent]` positions in the flattened `[tokens * k]`, ascending by slot.
    send_sizes, receive_sizes: rows to and from each rank.
    local_slots: `[rows received]` the slot of this rank that each received row is for.
    """

    order: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    local_slots: Tensor


def exchange_tokens(
    hidden_states: Float[Tensor, "tokens hidden"],
    slots: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    run_slots: RunSlots,
    topology: Topology,
    group: Group,
) -> Float[Tensor, "tokens hidden"]:
    """Sum, for every token, the weighted outputs of the experts in its slots, wherever they are.

    A collective of three all-to-alls (counts, rows, results). Every rank of the group must enter it, with any
    number of tokens, zero included. The counts are read back to the host: its one synchronisation. A late rank
    makes the others wait, at most for the timeout of the process group.

    Args:
        hidden_states: this rank's tokens.
        slots: slot ids; `EMPTY` adds nothing to the sum.
        weights: factor of each slot's output, applied on the rank of the token.
        run_slots: the experts of this rank; not called when no row arrives.
        topology: sizes of the group.
        group: process group of `topology.ep_size` ranks; None for the default group.

    Returns:
        `[tokens, hidden]` in the dtype of `hidden_states`.

    Raises:
        EplbError: if `run_slots` returns another shape than it got.
    """
    (num_tokens, hidden), k = hidden_states.shape, slots.shape[1]
    route = _plan_route(slots.reshape(-1), topology, group)
    rows = hidden_states[route.order // k]
    received = rows.new_empty((sum(route.receive_sizes), hidden))
    _all_to_all(received, rows, route.receive_sizes, route.send_sizes, group)
    results = received
    if received.shape[0]:
        results = run_slots(received, route.local_slots).to(rows.dtype).contiguous()
    require(
        results.shape == received.shape,
        "experts under `expert_parallel` must return a row of the same size for each row they get",
        f"{tuple(received.shape)} in, {tuple(results.shape)} out",
        "Wrap the experts module so that it keeps the hidden size.",
    )
    _all_to_all(rows, results, route.send_sizes, route.receive_sizes, group)
    outputs = rows.new_zeros((num_tokens * k, hidden))
    outputs[route.order] = rows
    weighted = outputs.view(num_tokens, k, hidden) * weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _all_to_all(output: Tensor, rows: Tensor, receive_sizes: list[int], send_sizes: list[int], group: Group) -> None:
    """As `dist.all_to_all_single`, whose errors would be hidden by others where it does not know the group by name."""
    known: Any = dist.group.WORLD if group is None else group
    known.alltoall_base(output, rows, receive_sizes, send_sizes).wait()


def _plan_route(slots: Tensor, topology: Topology, group: Group) -> _Route:
    """Count the rows for every slot, tell their ranks, and read back the sizes."""
    to_send = count_tokens(slots, topology.num_slots).view(topology.ep_size, topology.slots_per_rank)
    to_receive = torch.empty_like(to_send)
    _all_to_all(to_receive, to_send, [], [], group)
    send_sizes, receive_sizes = torch.stack([to_send.sum(dim=1), to_receive.sum(dim=1)]).tolist()
    last_if_empty = torch.where(slots == EMPTY, topology.num_slots, slots)
    local_slots = torch.arange(topology.slots_per_rank, device=slots.device).repeat(topology.ep_size)
    return _Route(
        order=torch.argsort(last_if_empty, stable=True)[: sum(send_sizes)],
        send_sizes=send_sizes,
        receive_sizes=receive_sizes,
        local_slots=local_slots.repeat_interleave(to_receive.view(-1), output_size=sum(receive_sizes)),
    )
