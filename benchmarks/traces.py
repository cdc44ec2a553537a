"""Loads to replay: recorded ones where they are present, and a synthetic drift."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(os.environ.get("EPLB_TRACES", Path(__file__).parents[2] / "shared" / "data"))


class Case(NamedTuple):
    """A trace, int64 `[windows, layers, logical]`, and the group that serves it."""

    name: str
    load: np.ndarray
    ep_size: int
    num_redundant: int


def recorded(name: str) -> np.ndarray | None:
    """`load` of an `.npz` in the traces' folder (`EPLB_TRACES`), or None if it is not there."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return np.rint(file["load"]).astype(np.int64)


def drift(
    num_layers: int = 58,
    num_logical: int = 256,
    num_windows: int = 12,
    *,
    drift: float = 0.15,
    noise: float = 0.6,
    seed: int = 0,
) -> np.ndarray:
    """Synthetic loads `[windows, layers, logical]`: a log-normal walk, seen through noise.

    The logarithm of each expert's load is a stationary Gaussian walk with standard deviation 1 that moves by
    `drift` per window, in 16 steps. Each step has independent noise of standard deviation `noise` on top. A window
    is the sum of its steps, scaled to about a million selections per layer, and Poisson counts of that.
    """
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(num_layers, num_logical))
    step = drift / 4
    windows = []
    for _ in range(num_windows):
        total = np.zeros_like(level)
        for _ in range(16):
            level = np.sqrt(1 - step**2) * level + step * rng.normal(size=level.shape)
            total += np.exp(level + noise * rng.normal(size=level.shape))
        windows.append(rng.poisson(total / total.sum(axis=1, keepdims=True) * 2**20))
    return np.stack(windows)


def cases() -> list[Case]:
    """The replays of the frontier benchmark; recorded ones only where they are present."""
    esft, subjects = recorded("esft_dsv2lite_w1024"), recorded("gptoss20b_by_subject_ge8192tok")
    found = []
    if esft is not None:
        found += [Case("ESFT, DeepSeek-V2-Lite", esft, 8, 8), Case("ESFT, DeepSeek-V2-Lite", esft, 16, 16)]
    if subjects is not None:
        found.append(Case("gpt-oss-20b by subject", subjects, 8, 8))
    noisy, pure = drift(), drift(noise=0.0)
    found += [Case("drift 0.15, noise 0.6", noisy, 32, 32), Case("drift 0.15, noise 0.6", noisy, 64, 64)]
    found += [Case("drift 0.03, noise 0.6", drift(drift=0.03), 32, 32)]
    found += [Case("drift 0.15, no noise", pure, 32, 32), Case("drift 0.15, no noise", pure, 64, 64)]
    return found
