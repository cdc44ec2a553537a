"""Garbage for every kind of argument, and harmless forms of good values: what the tests of hostile input feed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch


class Argument(NamedTuple):
    """A good value, and what it is.

    value: that the function accepts.
    kind: which garbage is tried instead of it; a name of `GARBAGE`.
    but: garbage that is accepted here, such as None for an option.
    """

    value: Any
    kind: str
    but: tuple[str, ...] = ()


class Call(NamedTuple):
    """A public function with good arguments.

    function: the function.
    arguments: by name.
    """

    function: Callable[..., Any]
    arguments: dict[str, Argument]

    def __call__(self, **changed: Any) -> Any:
        values = {name: argument.value for name, argument in self.arguments.items()}
        return self.function(**(values | changed))


class Hollow:
    """Says that it is an array, and fails when it is taken for one."""

    shape = (2, 12)
    ndim = 2

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("hollow")


class Unprintable:
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("unprintable")


def anything() -> dict[str, Any]:
    """What no function takes for a number, an array or one of its own values."""
    return {
        "None": None,
        "text": "abc",
        "bytes": b"abc",
        "complex": 1j,
        "object": object(),
        "unprintable": Unprintable(),
        "dict": {"a": 1},
        "set": {1, 2},
        "generator": (i for i in range(3)),
        "type": int,
        "lambda": lambda *_: None,
        "hollow": Hollow(),
        "ragged": [[1, 2], [3]],
        "huge text": "9" * 10_000,
    }


def counts() -> dict[str, Any]:
    """What is no size."""
    return anything() | {
        "true": True,
        "fraction": 1.5,
        "NaN": np.nan,
        "infinite": np.inf,
        "negative": -1,
        "most negative": -(2**63),
        "beyond int64": 2**64,
        "beyond printing": 10**5000,
        "digits": "2",
        "list": [2],
        "array": np.asarray([2, 3]),
        "one entry": np.asarray([2]),
        "0-d array": np.asarray(2.0),
    }


def numbers() -> dict[str, Any]:
    """What is no finite number >= 0."""
    kept = ("true", "NaN", "infinite", "negative", "most negative", "digits", "list", "array")
    return anything() | {name: value for name, value in counts().items() if name in kept}


def arrays(good: np.ndarray) -> dict[str, Any]:
    """What has not the kind or the shape of an array of numbers."""
    good = np.asarray(good)
    masked = np.ma.masked_array(good, mask=np.arange(good.size).reshape(good.shape) == 1)
    return anything() | {
        "number": 3,
        "true": True,
        "0-d": np.asarray(1),
        "1-d": good.reshape(-1),
        "4-d": good.reshape(1, 1, *good.shape[-2:]) if good.ndim == 2 else good[None],
        "no rows": good[:0],
        "no columns": good[..., :0],
        "more columns": np.concatenate([good, good], axis=-1),
        "fewer columns": good[..., :-1],
        "booleans": good > 0,
        "complexes": good.astype(complex),
        "objects": good.astype(object),
        "texts": good.astype(str),
        "dates": good.astype("datetime64[s]"),
        "records": np.zeros(good.shape, dtype=[("a", "<i4")]),
        "void": np.zeros(good.shape, dtype="V4"),
        "masked": masked,
        "beyond int64": [[2**70] * good.shape[-1]] * good.shape[-2],
        "with gradient": torch.tensor(good.tolist(), dtype=torch.float64, requires_grad=True),
        "meta tensor": torch.empty(good.shape, device="meta"),
        "list of None": [[None] * good.shape[-1]] * good.shape[-2],
    }


def with_entry(good: Any, value: Any, dtype: Any) -> np.ndarray:
    """A copy with one other entry, the last."""
    changed = np.asarray(good).astype(dtype)
    changed[(-1,) * changed.ndim] = value
    return changed


def loads(good: np.ndarray) -> dict[str, Any]:
    """What is no load."""
    return arrays(good) | {
        "NaN": with_entry(good, np.nan, float),
        "NaN of half": with_entry(good, np.nan, np.float16),
        "infinite": with_entry(good, np.inf, float),
        "minus infinite": with_entry(good, -np.inf, np.float32),
        "negative": with_entry(good, -1, np.int64),
        "negative float": with_entry(good, -0.5, float),
        "float that overflows": with_entry(good, 1e308, float),
        "sums that overflow": np.full(np.shape(good), 2**62),
        "NaN of JAX": jnp.asarray(with_entry(good, np.nan, np.float32)),
        "negative of torch": torch.from_numpy(with_entry(good, -1, np.int64)),
    }


def ids(good: np.ndarray) -> dict[str, Any]:
    """What is no placement."""
    return arrays(good) | {
        "floats": np.asarray(good).astype(float),
        "float list": np.asarray(good).astype(float).tolist(),
        "NaN": with_entry(good, np.nan, float),
        "below EMPTY": with_entry(good, -2, np.int32),
        "least int64": with_entry(good, -(2**63), np.int64),
        "most int32": with_entry(good, 2**31 - 1, np.int32),
        "damaged": with_entry(good, 2**20, np.int32),
        "good in 32 bits": with_entry(good, 2**32, np.int64),
        "most int64": with_entry(good, 2**63 - 1, np.int64),
        "most uint64": with_entry(good, 2**64 - 1, np.uint64),
        "EMPTY in 32 bits": with_entry(good, 2**32 - 1, np.uint32),
        "one more layer": np.concatenate([np.asarray(good), np.asarray(good)[:1]]),
    }


def topologies(_: Any) -> dict[str, Any]:
    """What is no topology."""
    return anything() | {"tuple": (4, 3, 2), "number": 12, "array": np.asarray([4, 3])}


def words(_: Any) -> dict[str, Any]:
    """What is none of a few words."""
    return anything() | {"number": 3, "array": np.asarray(["a", "b"]), "list": ["greedy"], "no text": ""}


GARBAGE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "count": lambda _: counts(),
    "number": lambda _: numbers(),
    "load": loads,
    "ids": ids,
    "topology": topologies,
    "word": words,
    "value": lambda _: anything() | {"number": 3, "array": np.arange(3)},
    "ranks": lambda _: (
        anything()
        | {"number": 3, "negative": [-1], "fraction": [0.5], "far": [2**40], "2-d": [[0]], "beyond int64": [2**70]}
    ),
}


def garbage(argument: Argument) -> Iterator[tuple[str, Any]]:
    """What must be refused instead of a good value, with its name."""
    for name, value in GARBAGE[argument.kind](argument.value).items():
        if name not in argument.but:
            yield name, value


def same(good: np.ndarray) -> dict[str, Any]:
    """A good array of small numbers in other forms, which must not make a difference."""
    good = np.asarray(good)
    read_only = good.copy()
    read_only.setflags(write=False)
    wide = np.zeros((*good.shape[:-1], 2 * good.shape[-1]), good.dtype)
    wide[..., ::2] = good
    forms = {
        "list": good.tolist(),
        "read-only": read_only,
        "Fortran": np.asfortranarray(good),
        "byte-swapped": good.astype(good.dtype.newbyteorder()),
        "every other": wide[..., ::2],
        "backwards": good[..., ::-1].copy()[..., ::-1],
        "transposed": good.T.copy().T,
        "int8": good.astype(np.int8),
        "int16": good.astype(np.int16),
        "int32": good.astype(np.int32),
        "int64": good.astype(np.int64),
        "not masked": np.ma.masked_array(good),
        "torch": torch.from_numpy(good.copy()),
        "torch, every other": torch.from_numpy(wide)[..., ::2],
    }
    if good.min() >= 0:
        forms |= {name: good.astype(name) for name in ("uint8", "uint16", "uint32", "uint64")}
    if good.ndim == 2:
        forms["matrix"] = good.view(np.matrix)
    return forms
