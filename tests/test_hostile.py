"""Hostile arguments: each is refused by `EplbError` with a short message, and harmless forms make no difference."""

import pytest

from eplb_core import EplbError
from tests.hostile import garbage
from tests.hostile_core import CONTROL, LOADS, PLANNING, SIZES

CALLS = PLANNING | LOADS | CONTROL | SIZES
CASES = [(name, argument) for name, call in CALLS.items() for argument in call.arguments]


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}-{argument}" for name, argument in CASES])
def test_garbage_is_refused(name, argument):
    call, got = CALLS[name], {}
    for label, value in garbage(call.arguments[argument]):
        try:
            got[label] = f"accepted: {call(**{argument: value})!r}"[:200]
        except EplbError as error:
            if len(str(error)) > 600:
                got[label] = f"a message of {len(str(error))} characters"
        except Exception as error:
            got[label] = f"{type(error).__name__}: {error}"[:200]
    assert not got, "\n" + "\n".join(f"{label}: {what}" for label, what in got.items())
