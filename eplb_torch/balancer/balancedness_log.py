"""How balanced the model really was: a reduction of its own, now and then."""

import logging
from collections import deque
from collections.abc import Mapping

import numpy as np

from eplb_core import model_balancedness, rank_load
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.balancer.tally import Tally
from eplb_torch.live_model import ServedModel
from eplb_torch.metrics import Metrics
from eplb_torch.transport import Transport, TransportError
from eplb_torch.worker import Job, Worker

logger = logging.getLogger("eplb_torch.balancer")


class BalancednessLog:
    """Adds up all ranks' loads every `log_balancedness_interval` steps, and logs on rank 0 how even their shares were.

    Args:
        models: by name.
        transport: used for nothing else at the same time.
        config: interval, timeout, and whether the reductions are made on a thread or in `step`.
        metrics: where the figures go besides.

    Attributes:
        tallies: of the load since the last time, by model; apart from those that decisions use.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], transport: Transport, config: BalancerConfig, metrics: Metrics
    ):
        self.tallies = {name: Tally(model) for name, model in models.items()}
        self._models, self._transport, self._config, self._metrics = models, transport, config, metrics
        self._worker = Worker("eplb-balancedness") if config.use_async else None
        self._jobs: deque[Job] = deque()

    def step(self, count: int) -> None:
        """Reduce, if step `count` ends an interval.

        Raises:
            TransportError: if an earlier reduction did not hear all ranks.
        """
        while self._jobs and self._jobs[0].done:
            self._jobs.popleft().result(0.0)
        if count % self._config.log_balancedness_interval:
            return
        loads = {name: tally.take() for name, tally in self.tallies.items()}
        placements = {name: model.placement for name, model in self._models.items()}
        if self._worker is None:
            self._reduce(count, loads, placements)
        else:
            self._jobs.append(self._worker.start(lambda: self._reduce(count, loads, placements)))

    def forget(self) -> None:
        """End the thread without waiting for the reductions under way, after ranks were lost."""
        self._jobs.clear()
        if self._worker is not None:
            self._worker.stop()

    def stop(self) -> None:
        """Wait for the reductions under way, and end their thread. Every rank calls it at the same step.

        Raises:
            TransportError, TimeoutError: if one did not hear all ranks.
        """
        if self._worker is not None:
            self._worker.stop()
        while self._jobs:
            self._jobs.popleft().result(2 * self._config.timeout)

    def _reduce(self, count: int, loads: dict[str, np.ndarray], placements: dict[str, np.ndarray]) -> None:
        mine = b"".join(load.tobytes() for load in loads.values())
        heard = self._transport.gather(mine, self._config.timeout)
        silent = [rank for rank, payload in enumerate(heard) if payload is None]
        if silent:
            raise TransportError(f"ranks {silent} did not report their load")
        total = np.sum([np.frombuffer(payload, dtype=np.int64) for payload in heard if payload], axis=0)
        start = 0
        for name, load in loads.items():
            summed = total[start : start + load.size].reshape(load.shape)
            start += load.size
            self._log(count, name, placements[name], summed)

    def _log(self, count: int, name: str, placement: np.ndarray, load: np.ndarray) -> None:
        topology = self._models[name].topology
        even = float(model_balancedness(placement, load, topology))
        self._metrics.observe_balancedness(name, even)
        if self._transport.rank == 0:
            on_rank = np.asarray(rank_load(placement, load, topology))
            logger.info(
                "step %d, %s: balancedness %.3f (tokens per rank and layer: mean %.1f, busiest %.1f)",
                *(count, name, even, on_rank.mean(), on_rank.max(axis=-1).mean()),
            )
