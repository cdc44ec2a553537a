"""Libraries of the extras: imported where they are used, or refused with what to install."""

import importlib
from types import ModuleType

from eplb_core._checks import EplbError


class MissingExtraError(EplbError, ImportError):
    """A library that an extra of this package brings is not installed.

    Attributes:
        name: the library.
    """

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Import a module of an optional library.

    Args:
        module: its full name.
        extra: which extra of this package brings it.
        user: what needs it, for the message.

    Raises:
        MissingExtraError: if the library is not installed. An import that fails within it raises as it does.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        message = f"`{user}` needs {library}; got none installed. Run `pip install 'eplb[{extra}]'`."
        raise MissingExtraError(message, library) from error
