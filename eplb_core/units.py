"""Bytes for people."""

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def unit_of(count: float | int) -> tuple[str, float]:
    """The unit in which so many bytes are a number of few digits, and its size.

    >>> unit_of(3e9)
    ('GB', 1000000000.0)
    """
    return next(((unit, size) for unit, size in _UNITS if count >= size), ("bytes", 1.0))


def in_units(count: float | int) -> str:
    """So many bytes with three digits and a unit.

    >>> in_units(0), in_units(44_040_192), in_units(999_999)
    ('0 bytes', '44 MB', '1000 kB')
    """
    unit, size = unit_of(count)
    value = count / size
    return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
