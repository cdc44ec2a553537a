"""Hostile arguments: each is refused by `EplbError` with a short message, and harmless forms make no difference."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from eplb_core import EplbError
from tests.hostile import garbage, same
from tests.hostile_core import CALLS as CORE
from tests.hostile_core import WRITES
from tests.hostile_torch import CALLS as TORCH
from tests.test_hostile_files import READERS

CALLS = CORE | TORCH
CASES = [(name, argument) for name, call in CALLS.items() for argument in call.arguments]
ARRAYS = [
    (name, argument)
    for name, argument in CASES
    if CALLS[name].arguments[argument].kind in ("load", "ids") and name not in {**WRITES, **TORCH}
]
DOCUMENTS = sorted((Path(__file__).parent.parent / "docs" / "api").glob("*.md"))

# Why a public name has no garbage of its own here.
EXEMPT = {
    "a value of plain fields, made by other functions": (
        "ExpertMaps MovePlan Schedule Violation Estimator Windows Decayed Change ControlState Decision ModelState "
        "Reason Trace StoredPlacement StoredPlan Migration Snapshot Survival Loss ElasticPlan LayerMaps Recorded "
        "RearrangeReport"
    ),
    "an error": "EplbError LostExpertsError PlanningError RearrangeError TransportError SimulationError",
    "a protocol": "ServedModel ElasticModel Transport Metrics",
    "takes no arguments": "last_value NoMetrics plugin",
    "a collective, whose ranks compare what they were given: tests/test_execute.py, tests/test_faults.py": (
        "ExpertBalancer Rearrangement ProcessGroupTransport StagedTransport rearrange reserve"
    ),
    "tested with real meshes: tests/test_sharded.py": "lower choose_width",
    "a strategy or model for tests: tests/test_testing.py": "eplb_core.testing",
    "tested with the engines: tests/test_vllm.py, tests/test_sglang.py, tests/test_huggingface.py": (
        "eplb_torch.integrations.huggingface eplb_torch.integrations.vllm eplb_torch.integrations.sglang"
    ),
    "elastic groups, tested in tests/test_elastic_torch.py": (
        "ElasticError ElasticGroup Change Membership Joining Newcomer Connections join is_loss"
    ),
}


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}-{argument}" for name, argument in CASES])
def test_garbage_is_refused(name, argument):
    call, got = CALLS[name], {}
    for label, value in garbage(call.arguments[argument]):
        try:
            got[label] = f"accepted: {call(**{argument: value})!r}"[:200]
        except EplbError as error:
            if len(str(error)) > 700:
                got[label] = f"a message of {len(str(error))} characters"
        except Exception as error:
            got[label] = f"{type(error).__name__}: {error}"[:200]
    assert not got, "\n" + "\n".join(f"{label}: {what}" for label, what in got.items())


@pytest.mark.parametrize("name", CALLS)
def test_what_garbage_was_put_in_place_of_is_accepted(name):
    try:
        CALLS[name]()
    except FileNotFoundError:
        assert name in WRITES  # which is to a place that is nowhere
    except EplbError:
        assert name == "load_snapshot"


@pytest.mark.parametrize(("name", "argument"), ARRAYS, ids=[f"{name}-{argument}" for name, argument in ARRAYS])
def test_harmless_forms_make_no_difference_and_are_not_written_to(name, argument):
    call = CALLS[name]
    expected = flat(call())
    for label, value in same(call.arguments[argument].value).items():
        before = np.asarray(value).copy()
        found = flat(call(**{argument: value}))
        assert len(found) == len(expected), label
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=label)
        np.testing.assert_array_equal(np.asarray(value), before, err_msg=f"{label} was written to")


def flat(value) -> list:
    """The numbers, texts and arrays in a result; times that planning took are no part of it."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if hasattr(value, "_asdict"):
        value = [part for key, part in value._asdict().items() if key != "planning_seconds"]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in flat(part)]
    return [] if callable(value) else [np.asarray(value)]


def documented() -> dict[str, object]:
    """Every public callable: what `__all__` names, or what modules without one define."""
    found = {}
    for document in DOCUMENTS:
        for module_name in re.findall(r"^::: ([\w.]+)", document.read_text(), re.MULTILINE):
            module = importlib.import_module(module_name)
            if module_name in names_of_exempt():
                continue
            listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
            for name in listed:
                value = getattr(module, name)
                if callable(value) and (hasattr(module, "__all__") or value.__module__ == module_name):
                    found[name] = value
    return found


def names_of_exempt() -> set[str]:
    return {name for names in EXEMPT.values() for name in names.split()}


def test_every_documented_function_is_fed_garbage():
    """A new public function needs an entry in `tests/hostile_core.py` or `tests/hostile_torch.py`."""
    fed = {re.split(r"[.,]", name)[0] for name in CALLS} | set(READERS) | names_of_exempt()
    missing = sorted(set(documented()) - fed)
    assert not missing, f"no garbage for {missing}"


@pytest.mark.parametrize("name", sorted({name for name in CALLS if re.fullmatch(r"\w+", name)}))
def test_every_argument_of_these_is_fed_garbage(name):
    """Switches, which any value turns on or off, and functions that are called aside."""
    known = set(CALLS[name].arguments)
    for other, call in CALLS.items():
        known |= set(call.arguments) if other.startswith(f"{name},") else set()
    function = CALLS[name].function
    while hasattr(function, "func"):
        function = function.func
    if function.__name__ in ("in_a_folder", "verify", "<lambda>"):
        return
    aside = {"allow_lost", "fill", "path", "format", "keep_placements", "limit_bytes", "load_like", "device", "enabled"}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(CALLS[name].function).parameters.values()
    missing = {p.name for p in parameters if p.kind not in variadic} - known - aside
    assert not missing, f"no garbage for {missing} of {name}"
