"""`relief.relieve_together` for NumPy: after each shift, only what it changed is counted again."""

import numpy as np

from eplb_core._checks import EMPTY


def shift_together(
    sender: np.ndarray, possible: np.ndarray, in_layers: np.ndarray, most: np.ndarray, enough: int
) -> np.ndarray:
    """Relieve the rank that sends most in all layers, one shift at a time, with the choices of `relief`.

    A shift costs `O(jobs of a layer + ep_size^2)` per rank on its path, and one comparison with all jobs.

    Args:
        sender: `[layers, jobs]` int32 the rank that sends each job; `EMPTY` where there is no job.
        possible: bool `[layers, jobs, ep_size]` whether a rank is a candidate of a job.
        in_layers: `[layers, ep_size]` messages that each rank sends, with those of these jobs.
        most: `[layers]` messages that a sender may have in a layer.
        enough: messages of one rank in all layers that need no relief.

    Returns:
        `[layers, jobs]` int32 the rank that sends each job.
    """
    state = _State(sender, possible, in_layers, most)
    while state.sent.max() > enough and state.shift():
        pass
    return state.sender


class _State:
    """Who sends what, and what follows from it.

    takes: bool `[ep_size, layers, jobs]`, a rank is a candidate of a job and has room in its layer.
    passes: `[ep_size, ep_size]` jobs of the first rank that the second takes.
    """

    def __init__(self, sender: np.ndarray, possible: np.ndarray, in_layers: np.ndarray, most: np.ndarray):
        self.sender, self.in_layers, self.most = sender.copy(), in_layers.copy(), most
        self.sent = in_layers.sum(axis=0)
        self.possible = np.ascontiguousarray(np.moveaxis(possible, 2, 0))
        self.takes = self.possible & (in_layers < most[:, None]).T[:, :, None]
        ep_size = len(self.sent)
        taker, layer, job = np.nonzero(self.takes)
        pairs = self.sender[layer, job] * ep_size + taker
        self.passes = np.bincount(pairs, minlength=ep_size**2).reshape(ep_size, ep_size)

    def shift(self) -> bool:
        """Take one message from a busiest rank along the first path to the least busy rank; False if none is left."""
        busiest = self.sent.max()
        parent, reached = _search(self.passes > 0, self.sent == busiest)
        taker = int(np.where(reached, self.sent, busiest + 1).argmin())
        if self.sent[taker] > busiest - 2:
            return False
        path = []
        while (giver := int(parent[taker])) != EMPTY:
            job = int(((self.sender == giver) & self.takes[taker]).argmax())
            path.append((*divmod(job, self.sender.shape[1]), giver, taker))
            taker = giver
        for step in path:
            self._give(*step)
        return True

    def _give(self, layer: int, job: int, giver: int, taker: int) -> None:
        can_take = self.takes[:, layer, job]
        self.passes[giver] -= can_take
        self.passes[taker] += can_take
        self.sender[layer, job] = taker
        for rank, change in ((giver, -1), (taker, 1)):
            self.sent[rank] += change
            self.in_layers[layer, rank] += change
            self._update_room(layer, rank)

    def _update_room(self, layer: int, rank: int) -> None:
        room = bool(self.in_layers[layer, rank] < self.most[layer])
        now = self.possible[rank, layer] & room
        changed = self.sender[layer][now != self.takes[rank, layer]]
        np.add.at(self.passes[:, rank], changed, 1 if room else -1)
        self.takes[rank, layer] = now


def _search(passes: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first: the rank from which each rank is first reached (`EMPTY` at the start), and who is reached."""
    frontier, reached, parent = start, start, np.full(len(start), EMPTY)
    while frontier.any():
        enter = frontier[:, None] & passes
        frontier = enter.any(axis=0) & ~reached
        reached = reached | frontier
        parent = np.where(frontier, enter.argmax(axis=0), parent)
    return parent, reached
