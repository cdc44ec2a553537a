"""Carries out the moves of one decision: of one model after another, beside the serving loop or in it."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from eplb_core import MovePlan
from eplb_torch.balancer.config import BalancerConfig
from eplb_torch.execute import rearrange
from eplb_torch.live_model import ServedModel
from eplb_torch.rearrangement import Rearrangement
from eplb_torch.report import RearrangeError
from eplb_torch.transport import Transport


class Moves(NamedTuple):
    """What one model is to do.

    name: of the model.
    plan: from `old` to `new`.
    old, new: int32 `[layers, slots]`.
    epoch: of `old`.
    """

    name: str
    plan: MovePlan
    old: Int[np.ndarray, "layers slots"]
    new: Int[np.ndarray, "layers slots"]
    epoch: int


class Progress(NamedTuple):
    """What has come of it at one boundary.

    name: of the model.
    placement: int32 `[layers, slots]` that its weights hold now.
    seconds: that all its moves have taken, once they are done; else None.
    waited: seconds that the serving thread had to wait here.
    """

    name: str
    placement: Int[np.ndarray, "layers slots"]
    seconds: float | None
    waited: float


class Mover:
    """Moves the weights of models, all ranks together.

    Args:
        models: by name.
        transport: of all ranks; used by nothing else while `busy`.
        config: timeouts and limits.
    """

    def __init__(self, models: Mapping[str, ServedModel], transport: Transport, config: BalancerConfig):
        self._models, self._transport, self._config = models, transport, config
        self._waiting: list[Moves] = []
        self._moves: Moves | None = None
        self._rearrangement: Rearrangement | None = None
        self._begun = 0.0

    @property
    def busy(self) -> bool:
        """Whether moves are under way or waiting."""
        return bool(self._waiting) or self._moves is not None

    def run(self, queue: list[Moves]) -> Iterator[Progress]:
        """Move models in place, one after another.

        Raises:
            RearrangeError: after a `Progress` that tells what has been committed.
        """
        for moves in queue:
            model, options = self._models[moves.name], self._options(moves)
            start = time.monotonic()
            try:
                rearrange(model.weights, moves.plan, model.topology, self._transport, **options)
            except RearrangeError as error:
                yield Progress(moves.name, error.placement(moves.old, moves.new), None, time.monotonic() - start)
                raise
            seconds = time.monotonic() - start
            yield Progress(moves.name, moves.new, seconds, seconds)

    def start(self, queue: list[Moves], boundary: int) -> None:
        """Begin to move models on threads; `boundary` is the number of the last call of `step`."""
        self._waiting = list(queue)
        self._start_next(boundary)

    def step(self, boundary: int) -> Progress | None:
        """Commit what all ranks commit at this boundary. None where that is nothing and nothing has ended.

        Raises:
            RearrangeError: once, if the moves have stopped; what was committed before has been told.
        """
        moves, rearrangement = self._moves, self._rearrangement
        if moves is None or rearrangement is None:
            return None
        waited = rearrangement.waited_seconds
        layers, done = rearrangement.step(), rearrangement.done
        waited = rearrangement.waited_seconds - waited
        seconds = time.monotonic() - self._begun if done else None
        if done:
            self._start_next(boundary)
        if not layers and not done and not waited:
            return None
        return Progress(moves.name, rearrangement.placement(moves.old, moves.new), seconds, waited)

    def drain(self, boundary: int) -> Iterator[Progress]:
        """Stop, and wait until no message is under way. Every rank calls it at the same boundary.

        Raises:
            RearrangeError: if ranks were lost, or this one has failed; after a `Progress` that tells what has been
                committed all the same.
        """
        while self._moves is not None and self._rearrangement is not None:
            moves, rearrangement, failure = self._moves, self._rearrangement, None
            try:
                rearrangement.drain()
            except RearrangeError as error:
                failure = error
            held = rearrangement.placement(moves.old, moves.new)
            if failure is None and np.array_equal(held, moves.new):
                # Another rank may have begun the next one already, and waits for all ranks to take part.
                self._start_next(boundary)
            else:
                self.forget()
            yield Progress(moves.name, held, None, 0.0)
            if failure is not None:
                raise failure

    def halt(self) -> None:
        """Stop on this rank alone, after others were lost. `settle` must follow."""
        self._waiting = []
        if self._rearrangement is None or not self._rearrangement.halt():
            self.forget()

    def held_back(self, name: str) -> Int[np.ndarray, "layers slots"] | None:
        """After `halt`, the placement of a model if `settle` commits all; None if there is nothing."""
        moves, rearrangement = self._moves, self._rearrangement
        if moves is None or rearrangement is None or moves.name != name:
            return None
        return rearrangement.placement(moves.old, moves.new, settled=True)

    def settle(self, name: str, chosen: Bool[np.ndarray, "layers slots"]) -> None:
        """Commit what is `held_back` in the slots that are chosen; let the rest go."""
        moves, rearrangement = self._moves, self._rearrangement
        if moves is not None and rearrangement is not None and moves.name == name:
            rearrangement.settle(chosen)
            self.forget()

    def forget(self) -> None:
        """Drop all moves, after one has failed."""
        self._waiting, self._moves, self._rearrangement = [], None, None

    def _start_next(self, boundary: int) -> None:
        self._moves = self._waiting.pop(0) if self._waiting else None
        self._rearrangement = None
        if self._moves is not None:
            model = self._models[self._moves.name]
            self._begun = time.monotonic()
            self._rearrangement = Rearrangement(
                *(model.weights, self._moves.plan, model.topology, self._transport),
                **self._options(self._moves),
                boundary=boundary,
            )

    def _options(self, moves: Moves) -> dict:
        config = self._config
        return {
            "timeout": config.timeout,
            "max_staging_bytes": config.max_staging_bytes,
            "checksum": config.checksum,
            "epoch": moves.epoch,
        }
