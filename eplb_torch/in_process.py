"""A transport between threads of one process, for tests of executors and for fuzzing them."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from eplb_core._checks import check_count
from eplb_torch.transport import Message, TransportError

Tag = tuple[int, int]
"""The number of the last `gather`, and the number of the `exchange` since then, or 0."""


class InProcessWorld:
    """Ranks that are threads: `world.transport(rank)` is each one's transport.

    Args:
        size: ranks.

    >>> world = InProcessWorld(size=1)
    >>> world.transport(0).gather(b"ready", timeout=1.0)
    [b'ready']
    """

    def __init__(self, size: int):
        self.size = check_count(size, "InProcessWorld(size=...)", 1, 2**14, "Count ranks.")
        self.dead: set[int] = set()
        self._changed = threading.Condition()
        self._boxes: dict[tuple[int, int, Tag], deque[bytes]] = defaultdict(deque)

    def transport(self, rank: int) -> "InProcessTransport":
        """The transport of one rank."""
        return InProcessTransport(self, rank)

    def kill(self, rank: int) -> None:
        """From now on every call of this rank raises, and its peers find the connection broken."""
        with self._changed:
            self.dead.add(rank)
            self._changed.notify_all()

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

    def put(self, src: int, dst: int, tag: Tag, payload: bytes) -> None:
        """Put one message into a rank's box."""
        with self._changed:
            self._boxes[src, dst, tag].append(payload)
            self._changed.notify_all()

    def take(self, src: int, dst: int, tag: Tag, deadline: float) -> bytes | None:
        """Take the oldest message; None if there is none by the deadline or its sender is dead."""
        with self._changed:
            box = self._boxes[src, dst, tag]
            while not box and src not in self.dead and dst not in self.dead:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return box.popleft() if box else None


class InProcessTransport:
    """One rank's end of an `InProcessWorld`. Subclass and override `deliver` to plant faults."""

    def __init__(self, world: InProcessWorld, rank: int):
        self.world, self.rank, self.size = world, rank, world.size
        self._tag: Tag = (0, 0)

    def deliver(self, peer: int, payload: bytes) -> None:
        """Put one message into a peer's box."""
        self.world.put(self.rank, peer, self._tag, payload)

    def connect(self, timeout: float) -> None:
        """See `Transport.connect`."""

    def gather(self, payload: bytes, timeout: float) -> list[bytes | None]:
        """See `Transport.gather`."""
        self._check_alive()
        self._tag = (self._tag[0] + 1, 0)
        for peer in range(self.size):
            self.deliver(peer, payload)
        deadline = time.monotonic() + timeout
        return [self._take(peer, deadline) for peer in range(self.size)]

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], timeout: float) -> None:
        """See `Transport.exchange`."""
        self._check_alive()
        self._tag = (self._tag[0], self._tag[1] + 1)
        for peer, tensor in sends:
            self.deliver(peer, tensor.cpu().numpy().tobytes())
        deadline = time.monotonic() + timeout
        for peer, tensor in recvs:
            payload = self._take(peer, deadline)
            if payload is None:
                raise TransportError(f"rank {self.rank} got nothing from rank {peer} in time")
            if len(payload) != tensor.numel():
                raise TransportError(
                    f"rank {self.rank} expected {tensor.numel()} bytes from rank {peer}, not {len(payload)}"
                )
            tensor.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    def _check_alive(self) -> None:
        if self.rank in self.world.dead:
            raise TransportError(f"rank {self.rank} was killed")

    def _take(self, peer: int, deadline: float) -> bytes | None:
        return self.world.take(peer, self.rank, self._tag, deadline)
