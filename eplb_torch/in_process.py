"""A transport between threads of one process, for tests of executors and for fuzzing them."""

import queue
import threading
import time
from collections.abc import Sequence

import torch

from eplb_torch.transport import Message, TransportError


class InProcessWorld:
    """Ranks that are threads: `world.transport(rank)` is each one's transport.

    Args:
        size: ranks.

    >>> world = InProcessWorld(size=1)
    >>> world.transport(0).all_gather(b"ready", timeout=1.0)
    [b'ready']
    """

    def __init__(self, size: int):
        self.size = size
        self.dead: set[int] = set()
        self._boxes = {(src, dst): queue.SimpleQueue() for src in range(size) for dst in range(size)}

    def transport(self, rank: int) -> "InProcessTransport":
        """The transport of one rank."""
        return InProcessTransport(self, rank)

    def kill(self, rank: int) -> None:
        """From now on every call of this rank raises, and its peers time out."""
        self.dead.add(rank)

    def run(self, function, *args, timeout: float = 30.0) -> list:
        """Call `function(transport, *args)` on every rank at once; return results or exceptions, in rank order.

        Raises:
            TimeoutError: if a rank is still running after `timeout` seconds.
        """
        results: list = [None] * self.size

        def body(rank: int) -> None:
            try:
                results[rank] = function(self.transport(rank), *args)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late:
            raise TimeoutError(f"ranks {late} still run after {timeout} seconds")
        return results


class InProcessTransport:
    """One rank's end of an `InProcessWorld`. Subclass and override `deliver` to plant faults."""

    def __init__(self, world: InProcessWorld, rank: int):
        self.world, self.rank, self.size = world, rank, world.size

    def deliver(self, peer: int, payload: bytes) -> None:
        """Put one message into a peer's box."""
        self.world._boxes[self.rank, peer].put(payload)

    def all_gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """See `Transport.all_gather`."""
        self._check_alive()
        for peer in range(self.size):
            self.deliver(peer, payload)
        deadline = time.monotonic() + timeout
        return [self._take(peer, deadline) for peer in range(self.size)]

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        self._check_alive()
        for peer, tensor in sends:
            self.deliver(peer, tensor.cpu().numpy().tobytes())
        deadline = time.monotonic() + timeout
        for peer, tensor in recvs:
            payload = self._take(peer, deadline)
            if len(payload) != tensor.numel():
                raise TransportError(
                    f"rank {self.rank} expected {tensor.numel()} bytes from rank {peer}, not {len(payload)}"
                )
            tensor.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    def _check_alive(self) -> None:
        if self.rank in self.world.dead:
            raise TransportError(f"rank {self.rank} was killed")

    def _take(self, peer: int, deadline: float) -> bytes:
        try:
            return self.world._boxes[peer, self.rank].get(timeout=max(deadline - time.monotonic(), 1e-3))
        except queue.Empty:
            raise TransportError(f"rank {self.rank} got nothing from rank {peer} in time") from None
