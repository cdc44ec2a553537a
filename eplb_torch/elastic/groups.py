"""Process groups made in place, one after another, beside the default group; and broken ones let go.

`init_process_group` makes one default group for the life of a process. Where ranks are lost and others join, each
change needs a new one, while threads may still wait on the old one. So these groups stand alone: `torch.distributed`
does not know them by name; its functions take them as `group=...`, with ranks of the group (`group_dst`).
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from eplb_core._checks import require
from eplb_torch.elastic.members import MembersLost
from eplb_torch.elastic.membership import Membership
from eplb_torch.transport import TransportError
from eplb_torch.worker import Worker

MakeGroup = Callable[[Store, int, int, float], dist.ProcessGroup]
"""`(store, rank, size, timeout) -> group`: connects `size` processes that call it with the same store."""

_LOOK_SECONDS = 0.05
_BREAK_SECONDS = 5.0
_NO_TAG = 2**30  # of a message that nobody sends


def form_group(
    store: Store, rank: int, size: int, timeout: float, *, device: torch.device | str = "cpu"
) -> dist.ProcessGroup:
    """Connect processes as a group of its own. A collective of the `size` processes that share the store.

    Args:
        store: empty; a `PrefixStore` of its own for every group.
        rank: of this process in the group.
        size: of the group.
        timeout: seconds that connecting, and then each collective, may take.
        device: `"cpu"` for Gloo; `"cuda"` for NCCL, with Gloo for tensors on the CPU. NCCL is not verified.

    Raises:
        EplbError: if there is no backend here for the device. Pass a function of your own as `make_group` then.
        RuntimeError: if not all came in time.
    """
    kind = torch.device(device).type
    require(
        kind == "cpu" or (kind == "cuda" and dist.is_nccl_available()),
        "`form_group(device=...)` must be 'cpu', or 'cuda' where torch has NCCL",
        f"{str(device)!r}",
        "Pass make_group=... with a function that connects processes by another backend.",
    )
    group, limit = dist.ProcessGroup(store, rank, size), timedelta(seconds=timeout)
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, limit)
    _register(group, "cpu", dist.ProcessGroup.BackendType.GLOO, gloo)
    if kind == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
        _register(group, "cuda", dist.ProcessGroup.BackendType.NCCL, nccl)
    return group


def form_together(
    membership: Membership, what: str, *, timeout: float, connect_timeout: float, make_group: MakeGroup = form_group
) -> dist.ProcessGroup:
    """Connect all members of the present generation. A collective; on return all of them are connected.

    Args:
        membership: whose members.
        what: names the group; each once in a generation.
        timeout: of the group's collectives, in seconds.
        connect_timeout: seconds to wait for all members. A dead one ends it sooner.
        make_group: connects.

    Raises:
        MembersLost: if not all could be connected. What this process has connected is broken again.
        MembershipError: if the store failed.
    """
    members, store = membership.members, PrefixStore(what, membership.store)
    deadline = time.monotonic() + connect_timeout
    # On a thread that is left alone if members die, as they are waited for until the group's own timeout.
    worker = Worker("eplb-connect")
    job = worker.start(lambda: make_group(store, members.rank, members.size, timeout))
    worker.stop()
    while not job.wait(_LOOK_SECONDS):
        membership.check()
        if time.monotonic() > deadline:
            raise MembersLost(f"the members of generation {members.generation} were not connected in time")
    try:
        group = job.result(0.0)
    except RuntimeError as error:
        raise TransportError(f"generation {members.generation} could not be connected: {error}") from error
    try:
        membership.meet(f"connected {what}", max(deadline - time.monotonic(), _LOOK_SECONDS))
    except MembersLost:
        break_group(group)
        raise
    return group


def break_group(group: dist.ProcessGroup | None) -> None:
    """End every wait on a group, here and on its other ranks, by closing its connections. Local; may be repeated.

    Peers that wait for this process get an error at once, instead of when their timeout ends. `abort` of a Gloo group
    closes nothing (torch 2.13), but a wait of its own that runs out of time does, for that group alone. Groups on other
    backends are aborted, which for NCCL is `ncclCommAbort`; that is not verified.
    """
    if group is None:
        return
    # On a thread that may be left alone: aborting on an accelerator can itself wait.
    thread = threading.Thread(target=_break, args=(group,), daemon=True, name="eplb-break")
    thread.start()
    thread.join(_BREAK_SECONDS)


def _register(group: dist.ProcessGroup, device: str, kind, backend) -> None:
    backend._set_sequence_number_for_group()
    group._set_default_backend(kind)
    group._register_backend(torch.device(device), kind, backend)


def _break(group: dist.ProcessGroup) -> None:
    for device in group._device_types if group.size() > 1 else []:
        # It raises, as it should: because the time is over, or because the connections had been closed before.
        with suppress(RuntimeError):
            if device.type == "cpu":
                group.recv_anysource([torch.zeros(1)], _NO_TAG).wait(timedelta(milliseconds=1))
            else:
                group._get_backend(device).abort()
