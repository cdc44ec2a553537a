"""A daemon thread that does one job after another, and whose end is noticed."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Job:
    """Work under way. `done` may be asked at any time and takes no lock."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._finished = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._finished.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait until the work is done, at most `timeout` seconds. Returns whether it is."""
        return self._finished.wait(timeout)

    def run(self) -> None:
        """Do the work and keep what came of it."""
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._finished.set()

    def result(self, timeout: float) -> Any:
        """Return what the work returned, or raise what it raised.

        Raises:
            TimeoutError: if it is not done within `timeout` seconds.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the balancer's worker was not done within {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._result


class Worker:
    """Runs jobs in the order in which they are given. The thread starts with the first."""

    def __init__(self, name: str):
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, function: Callable[[], Any]) -> Job:
        """Queue a job."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name=self._name)
            self._thread.start()
        job = Job(function)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """End the thread once its queue is empty; later jobs start another."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job
