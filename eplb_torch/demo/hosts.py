"""Which ranks host which experts, by the numbers that the ranks began with, also when some are lost."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from eplb_core import Topology, rank_load


class Hosts(NamedTuple):
    """A placement and who holds it, at one moment.

    placement: `[layers, slots]` of the ranks that are left.
    topology: of these.
    ranks: what each of them was called in the beginning.
    first_size: ranks in the beginning.
    """

    placement: Int[np.ndarray, "layers slots"]
    topology: Topology
    ranks: tuple[int, ...]
    first_size: int

    def rank_load(self, load: Real[np.ndarray, "layers logical"]) -> Float[np.ndarray, "layers first_size"]:
        """Return the tokens that each of the first ranks gets, NaN for those that are lost.

        >>> Hosts(np.asarray([[0, 1]]), Topology(2, 1), (0, 2), 3).rank_load(np.asarray([[5, 3]])).tolist()
        [[5.0, nan, 3.0]]
        """
        by_rank = np.full((len(load), self.first_size), np.nan)
        by_rank[:, list(self.ranks)] = rank_load(self.placement, load, self.topology)
        return by_rank


def balancedness_of_layers(rank_load: Float[np.ndarray, "layers ep_size"]) -> Float[np.ndarray, " layers"]:
    """Return mean / maximum over the ranks that are left.

    >>> balancedness_of_layers(np.asarray([[1.0, np.nan, 3.0], [2.0, np.nan, 2.0]])).round(2).tolist()
    [0.67, 1.0]
    """
    return np.nanmean(rank_load, axis=1) / np.nanmax(rank_load, axis=1)
