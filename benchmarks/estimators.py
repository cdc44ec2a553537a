"""Back-test of the load estimators: how well each foresees the next window, and what a placement made from it gains.

    python -m benchmarks.estimators

Share error: half the sum over experts of |estimated share - share in the next window| (total variation), the mean over
layers and windows. Balancedness: of the next window under a placement planned anew from the estimate (`refined`), and
under one improved window by window (`incremental`), with the experts that the latter moved.
"""

import numpy as np

from benchmarks.page import printed
from benchmarks.traces import FOLDER, Case, cases
from eplb_core import Topology
from eplb_core.simulate import simulate
from eplb_core.simulate.configuration import parse_estimator

ESTIMATORS = (
    ("last",)
    + tuple(f"window:{n}" for n in (2, 4, 8))
    + tuple(f"decay:{h}" for h in (0.5, 1, 2, 4))
    + tuple(f"trend:{n}" for n in (2, 4, 8))
)


def share_error(load: np.ndarray, spec: str) -> float:
    """Mean total variation between estimated and later shares, over windows and layers that have load."""
    estimator = parse_estimator(spec)
    state, errors = estimator.init(*load.shape[1:]), []
    for now, then in zip(load[:-1], load[1:], strict=True):
        state = estimator.update(state, now)
        expected = np.asarray(estimator.estimate(state), dtype=float)
        totals = expected.sum(axis=1), then.sum(axis=1)
        busy = (totals[0] > 0) & (totals[1] > 0)
        shares = [x[busy] / total[busy, None] for x, total in zip((expected, then), totals, strict=True)]
        errors.append(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)
    return float(np.mean(errors))


def chosen() -> list[Case]:
    """Recorded traces on 8 ranks, and drifts with and without noise on 32, small enough to plan anew each time."""
    return [case for case in cases() if case.ep_size == (8 if "drift" not in case.name else 32)]


def main() -> None:
    """Print the table, and the best estimator of each trace."""
    if not FOLDER.exists():
        print(f"Recorded traces are not in {FOLDER} (set EPLB_TRACES); back-testing synthetic ones only.\n")
    print("| trace | estimator | share error | refined | incremental | moved experts |")
    print("|---|---|---|---|---|---|")
    for case in chosen():
        load = case.load if "drift" not in case.name else case.load[:, :8]
        topology = Topology.from_experts(load.shape[2], case.ep_size, num_redundant=case.num_redundant)
        found = {}
        for spec in ESTIMATORS:
            refined = simulate(load, topology, policy="refined", estimator=spec)
            incremental = simulate(load, topology, estimator=spec)
            found[spec] = incremental.mean_balancedness
            print(
                f"| {case.name} | {spec} | {share_error(load, spec):.4f} | {refined.mean_balancedness:.4f} "
                f"| {incremental.mean_balancedness:.4f} | {incremental.moved_experts} |",
                flush=True,
            )
        print(f"| {case.name} | best: {max(found, key=found.__getitem__)} | | | | |")


READING = """
Lost: no estimator is best on all traces. Averages help where windows are noisy, and hurt where load drifts without
noise: there the last window alone is best.
"""


def report() -> str:
    """The tables, as Markdown."""
    return printed(main)


if __name__ == "__main__":
    main()
