"""How sure a score is that comes from a sample."""

from math import sqrt

Z = 1.96  # two-sided, 95 %


def wilson(killed: int, tried: int, total: int) -> tuple[float, float]:
    """The 95 % interval (Wilson) of a share seen in `tried` of `total`; a point where all were tried."""
    if tried == 0:
        return 0.0, 1.0
    share, tried = killed / tried, tried * (total - 1) / (total - tried) if tried < total else float("inf")
    if tried == float("inf"):
        return share, share
    middle = (share + Z**2 / (2 * tried)) / (1 + Z**2 / tried)
    half = Z / (1 + Z**2 / tried) * sqrt(share * (1 - share) / tried + Z**2 / (4 * tried**2))
    return middle - half, middle + half


def overall(strata: list[tuple[int, int, int]]) -> tuple[float, float]:
    """The share of all mutants that is killed, from (killed, tried, total) of each module, and half its interval."""
    everything = sum(total for *_, total in strata)
    share = sum(killed / tried * total for killed, tried, total in strata) / everything
    variance = 0.0
    for killed, tried, total in strata:
        if 1 < tried < total:
            p = (killed + 1) / (tried + 2)  # not zero where all were killed
            variance += (total / everything) ** 2 * p * (1 - p) / (tried - 1) * (total - tried) / (total - 1)
    return share, Z * sqrt(variance)
