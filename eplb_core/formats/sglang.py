"""SGLang and sglang-jax: `--init-expert-location` files, as JSON, and SGLang's recordings, as `.pt`.

SGLang counts every layer of the model, so layers without experts are rows of zeros.
"""

from typing import Any

import numpy as np

from eplb_core._checks import require
from eplb_core._files import PathLike
from eplb_core.formats.values import load_of, placement_of


def load_from_object(value: Any, path: PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Return load and (no) metadata of `{"logical_count": [windows, layers, experts]}`."""
    require(
        isinstance(value, dict) and "logical_count" in value,
        f"`{path}` must have counts as `logical_count`",
        f"keys {sorted(map(str, value))[:8] if isinstance(value, dict) else []}",
        "A placement is not a trace.",
    )
    return load_of(value["logical_count"], path), {}


def placement_from_object(value: Any, path: PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement of `{"physical_to_logical_map": [layers, slots]}`."""
    require(
        isinstance(value, dict) and "physical_to_logical_map" in value,
        f"`{path}` must have a placement as `physical_to_logical_map`",
        f"keys {sorted(map(str, value))[:8] if isinstance(value, dict) else []}",
        "If it holds loads, make a placement with `eplb plan`.",
    )
    return placement_of(value["physical_to_logical_map"], path), {}
