"""Put something of ours in the place of something of an engine's, in a way that can be checked and undone."""

import importlib
import inspect
import json
import os
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import Any

from eplb_core._checks import require


def swap(table: MutableMapping[str, Any], name: str, value: Any) -> ExitStack:
    """Set `table[name]`; closing the result puts back what was there, unless someone else has replaced it since."""
    known, before = name in table, table.get(name)
    table[name] = value

    def restore() -> None:
        if table.get(name) is not value:
            return
        if known:
            table[name] = before
        else:
            del table[name]

    undo = ExitStack()
    undo.callback(restore)
    return undo


def check_version(engine: str, tested: tuple[str, ...], force: bool) -> None:
    """Refuse a release of `engine` that this plug was not tested with, unless forced.

    Raises:
        EplbError: naming the release found and those tested.
        ModuleNotFoundError: if the engine is not installed.
    """
    found = str(getattr(importlib.import_module(engine), "__version__", "unknown"))
    require(
        force or found.partition("+")[0] in tested,
        f"this plug was tested with {engine} {', '.join(tested)}",
        f"{engine} {found}",
        "Install a tested release, or pass force=True and watch the first rebalance.",
    )


def check_signature(ours: Callable[..., Any], theirs: Callable[..., Any], engine: str) -> None:
    """Refuse an engine that calls its planner with other arguments than we expect; `force` does not help there.

    Raises:
        EplbError: with both lists of parameters.
    """
    expected, found = (list(inspect.signature(function).parameters) for function in (ours, theirs))
    require(
        found == expected,
        f"`rebalance_experts` of {engine} must take {expected}",
        f"{found}",
        "This release calls its planner differently; use a tested one.",
    )


def options_from(variable: str) -> dict[str, Any] | None:
    """Read the options of a plug from an environment variable: the name of a policy, or a JSON object.

    Returns:
        Keyword arguments, or None if the variable is unset or empty, which means that nothing shall be changed.

    Raises:
        EplbError: if it is neither a word nor a JSON object.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if text.isidentifier():
        return {"policy": text}
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    require(
        isinstance(options, dict),
        f"the environment variable {variable} must be the name of a policy or a JSON object of options",
        f"{variable}={text!r}",
        f"""Write {variable}=incremental or {variable}='{{"policy": "incremental", "max_moves": 8}}'.""",
    )
    return options
