"""Take at start-up what the first rearrangement would otherwise allocate while the model serves."""

from eplb_core import Topology
from eplb_torch.staging import Staging
from eplb_torch.transaction.checksum import CHECKSUM_BYTES
from eplb_torch.transport import Transport, TransportError
from eplb_torch.weights import ExpertWeights


def reserve(
    weights: ExpertWeights,
    topology: Topology,
    transport: Transport,
    *,
    timeout: float,
    max_staging_bytes: int = 256 * 2**20,
) -> Staging:
    """Allocate, touch and connect all that the largest possible rearrangement needs. A collective.

    Pass the result to `rearrange` or `Rearrangement` as `staging`, with the same `max_staging_bytes`. They allocate
    no further memory for rows then, whatever the plan. Kept memory is that of `Staging.capacity`, which is less than
    `max_staging_bytes` for a model whose rows all fit into less.

    Args:
        weights: this rank's.
        topology: sizes.
        transport: connected here, so that buffers of lazily made communicators exist too.
        timeout: seconds to wait for the other ranks.
        max_staging_bytes: as for `rearrange`.

    Returns:
        The memory.

    Raises:
        TransportError: if a rank does not take part.
        RuntimeError: if there is not enough memory, on this rank (`torch.OutOfMemoryError` on accelerators).
    """
    staging = Staging(weights.device)
    staging.require(worst_case_bytes(weights, topology, max_staging_bytes))
    staging.touch()
    lost = [rank for rank, payload in enumerate(transport.gather(b"r", timeout)) if payload is None]
    if lost:
        raise TransportError(f"ranks {lost} did not reserve within {timeout:g} s")
    transport.connect(timeout)
    return staging


def worst_case_bytes(weights: ExpertWeights, topology: Topology, max_staging_bytes: int) -> int:
    """Most that any plan can need on one rank.

    Every slot may take a row from another rank, and every other rank may ask for all of them. What exceeds the limit
    is split, down to a cycle, through which each slot of one layer takes at most one row, while rows are sent in
    place or, if they are not contiguous, through a buffer.
    """
    per_layer = [weights.row_bytes(layer) + CHECKSUM_BYTES for layer in range(weights.num_layers)]
    received = topology.slots_per_rank * sum(per_layer)
    sent = received * (topology.ep_size - 1)
    strided = any(not field.flat for layer in range(weights.num_layers) for field in weights.fields(layer))
    cycle = topology.slots_per_rank * max(per_layer) * (2 if strided else 1)
    padding = 4096 * topology.ep_size
    return padding + min(received + sent, max(max_staging_bytes, cycle))
