"""Signs of life in a store: each process counts up a number of its own, and others look whether it grows."""

import atexit
import threading
import time

from torch.distributed.distributed_c10d import Store

_STOP_SECONDS = 1.0
MOST_PER_LOOK = 0.25  # of the silence: an observer that was held up does not take its own sleep for that of others


class Pulse:
    """Beats in a daemon thread, from now until `stop`, or until the store fails or the process ends.

    A process that is busy goes on beating; one that is dead or stopped by a signal does not.

    Args:
        store: outlives the processes that use it. Beats go over a connection of their own where it can be cloned.
        name: of this process.
        interval: seconds between beats.
    """

    def __init__(self, store: Store, name: str, interval: float):
        self._store, self._key, self._interval = own_connection(store), _key(name), interval
        self._stopped = threading.Event()
        self._store.add(self._key, 1)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="eplb-pulse")
        self._thread.start()
        atexit.register(self.stop)  # a daemon thread inside the store when the interpreter ends aborts the process

    def stop(self) -> None:
        """Stop beating: to others this process is dead from now on."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)
        atexit.unregister(self.stop)

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._store.add(self._key, 1)
            except RuntimeError:
                return  # without the store nobody hears it; whoever needs the store will say so


class Watch:
    """What one process sees of the beats of others. Only looking lets time pass: look often.

    Args:
        store: as given to `Pulse`.
        silence: seconds without a beat after which a process counts as dead.

    >>> from torch.distributed import HashStore
    >>> store = HashStore()
    >>> watch = Watch(store, silence=60.0)
    >>> pulse = Pulse(store, "a", interval=60.0)
    >>> watch.is_silent("a"), watch.has_beaten("a")
    (False, False)
    """

    def __init__(self, store: Store, silence: float):
        self._store, self._silence = store, silence
        self._count: dict[str, int] = {}
        self._looked: dict[str, float] = {}
        self._silent_for: dict[str, float] = {}
        self._heard: set[str] = set()

    def is_silent(self, name: str) -> bool:
        """Look, and say whether a process has not beaten for as long as this one has been looking, or longer."""
        self._look(name)
        return self._silent_for[name] >= self._silence

    def has_beaten(self, name: str) -> bool:
        """Look, and say whether a process has been seen to beat, and is not silent since."""
        return not self.is_silent(name) and name in self._heard

    def _look(self, name: str) -> None:
        count, now = self._store.add(_key(name), 0), time.monotonic()
        if name not in self._count:
            self._silent_for[name] = 0.0
        elif count != self._count[name]:
            self._silent_for[name] = 0.0
            self._heard.add(name)
        else:
            self._silent_for[name] += min(now - self._looked[name], MOST_PER_LOOK * self._silence)
        self._count[name], self._looked[name] = count, now


def own_connection(store: Store) -> Store:
    """A second connection to a store, so that one thread need not wait for another's long call."""
    clone = getattr(store, "clone", None)  # younger than torch 2.6
    return store if clone is None else clone()


def _key(name: str) -> str:
    return f"beat/{name}"
