"""Layer numbers: rows that an engine wants for every layer of the model, MoE or not."""

import numpy as np

from eplb_core._checks import EplbError, shown
from eplb_core._files import PathLike
from eplb_core.formats.values import layer_ids_of

_MOST_LAYERS = 10_000


def layer_ids_or_range(layer_ids: object, num_layers: int, path: PathLike) -> list[int]:
    """Return the model's numbers of `num_layers` rows, `0, 1, ...` if they are not given.

    Raises:
        EplbError: if they are not as many different integers.
    """
    if layer_ids is None:
        return list(range(num_layers))
    found = layer_ids_of(layer_ids, path) if isinstance(layer_ids, list | tuple | range) else []
    if len(found) != num_layers or max(found) >= _MOST_LAYERS:
        raise EplbError(
            f"`{path}` must number each layer in `layer_ids`, below {_MOST_LAYERS}; "
            f"got {shown(layer_ids)} for {num_layers} layers. Correct or drop them."
        )
    return found


def spread_out(rows: np.ndarray, layer_ids: list[int], fill: np.ndarray | int) -> np.ndarray:
    """Put row `i` of axis -2 at `layer_ids[i]`, and `fill` where there is none.

    >>> spread_out(np.asarray([[5, 6], [7, 8]]), [3, 1], fill=0).tolist()
    [[0, 0], [7, 8], [0, 0], [5, 6]]
    """
    if layer_ids == list(range(len(layer_ids))):
        return rows
    shape = (*rows.shape[:-2], max(layer_ids) + 1, rows.shape[-1])
    out = np.empty(shape, rows.dtype)
    out[...] = fill
    out[..., layer_ids, :] = rows
    return out
