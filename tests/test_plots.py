"""Pictures show the numbers that they were given, with labels and units, and touch no global state."""

import subprocess
import sys

import numpy as np
import pytest

from eplb_core import EplbError, Topology, plan_moves, plots, schedule_rounds
from eplb_core.costs import transfer_matrix
from eplb_core.plots.frontier import undominated
from eplb_core.plots.style import COLOURS, MARKERS, colour, marker, spread
from eplb_core.simulate import balancedness_bound
from eplb_core.simulate.configuration import grid
from eplb_core.simulate.sweep import sweep
from eplb_core.testing import model_rank_load

pytest.importorskip("matplotlib")

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3, num_nodes=2)
NAMES = ["static", "greedy", "incremental"]


@pytest.fixture(scope="module")
def load():
    rng = np.random.default_rng(0)
    return rng.poisson(np.exp(rng.normal(size=(5, 10))) * 200, (12, 5, 10))


@pytest.fixture(scope="module")
def replays(load):
    return sweep(load, grid(TOPOLOGY, policy=NAMES, interval=2))


def texts(figure):
    """All that is written in a figure."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def images(figure):
    from matplotlib.image import AxesImage

    return [image.get_array() for image in figure.findobj(AxesImage)]


def test_the_timeline_shows_balancedness_and_marks_rebalances(load, replays):
    bound = balancedness_bound(load, TOPOLOGY).mean(axis=1)
    figure = plots.timeline(replays, bound=bound)
    top, below = figure.axes
    curves = [line for line in top.get_lines() if len(line.get_xdata()) == 11 and line.get_marker() == "None"]
    for curve, series in zip(curves, [*(r.balancedness.mean(axis=1) for r in replays), bound], strict=True):
        np.testing.assert_array_equal(curve.get_xdata(), np.arange(1, 12))
        np.testing.assert_allclose(curve.get_ydata(), series)
    marked = [line for line in top.get_lines() if line.get_marker() != "None"]
    moved = [line for line in below.get_lines()]
    for replay, marks, dots in zip(replays, marked, moved, strict=True):
        events = [event for event in replay.rebalances if event.migration.moved_experts]
        assert marks.get_xdata().tolist() == dots.get_xdata().tolist() == [event.window + 1 for event in events]
        assert list(dots.get_ydata()) == [event.migration.moved_experts for event in events]
    written = texts(figure)
    assert {"static", "greedy, every 2", "incremental, every 2", "bound", "window", "experts\nmoved"} <= set(written)
    assert len({line.get_color() for line in curves}) == 4


def test_the_timeline_of_nothing_moved_can_be_drawn(replays):
    plots.png(plots.timeline(replays[:1]))


def test_the_frontier_shows_moves_and_balance(replays):
    figure = plots.frontier(replays)
    (axis,) = figure.axes
    points = [line.get_xydata()[0].tolist() for line in axis.get_lines() if len(line.get_xdata()) == 1]
    assert points == [pytest.approx([r.moved_experts / 11, r.mean_balancedness]) for r in replays]
    assert {"experts moved per window", "balancedness on the next window", "static"} <= set(texts(figure))


def test_the_frontier_of_many_points_names_the_undominated_ones(load):
    many = sweep(load, grid(TOPOLOGY, policy=["greedy", "refined", "incremental"], interval=[1, 2, 3, 5]))
    labels = [replay.configuration.label for replay in many]
    named = [label for label in labels if label in texts(plots.frontier(many))]
    moved = np.asarray([replay.moved_experts for replay in many])
    balance = np.asarray([replay.mean_balancedness for replay in many])
    assert sorted(named) == sorted(labels[index] for index in undominated(moved, balance))


def test_undominated_points_are_those_that_no_other_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(pair) for pair in rng.integers(0, 6, (8, 2)).tolist()]
        found = undominated(*np.asarray(points, dtype=float).T).tolist()
        for moves, balance in points:
            beaten = any(x <= moves and y >= balance and (x, y) != (moves, balance) for x, y in points)
            assert beaten is not any(points[index] == (moves, balance) for index in found)


def test_rank_loads_are_shown_over_their_layers_mean(load, replays):
    before, after = replays[1].placements[0], replays[1].placements[-1]
    figure = plots.rank_loads(before, after, load[-1], TOPOLOGY, titles=("old", "new"))
    for image, placement in zip(images(figure), (before, after), strict=True):
        expected = [
            model_rank_load(*pair, TOPOLOGY) for pair in zip(placement.tolist(), load[-1].tolist(), strict=True)
        ]
        np.testing.assert_allclose(image, np.asarray(expected) / np.mean(expected, axis=1, keepdims=True))
    written = texts(figure)
    assert {"rank", "layer", "rank load / mean of the layer"} <= set(written)
    assert any(text.startswith("old\nbalancedness 0.") for text in written)


def test_transfers_are_shown_in_bytes_with_nodes_apart(replays):
    old, new = replays[1].placements[:2]
    matrix = transfer_matrix(schedule_rounds(plan_moves(old, new, TOPOLOGY), TOPOLOGY), TOPOLOGY)
    figure = plots.transfers(matrix, TOPOLOGY, bytes_per_expert=2 * 10**6, title="plan")
    np.testing.assert_allclose(images(figure)[0], matrix * 2.0)
    axis = figure.axes[0]
    across, down = axis.get_lines()  # one border between two nodes, each way
    assert set(across.get_ydata()) == set(down.get_xdata()) == {1.5}
    written = texts(figure)
    assert {"MB", "sending rank", "receiving rank", f"plan: {matrix.sum()} experts, {2 * matrix.sum()} MB"} <= set(
        written
    )


def test_copies_are_shown_per_expert(replays):
    placement = replays[1].placements[-1]
    figure = plots.replicas(placement, 10)
    expected = [[row.count(expert) for expert in range(10)] for row in placement.tolist()]
    np.testing.assert_array_equal(images(figure)[0], expected)
    assert {"expert", "layer", "copies"} <= set(texts(figure))


def test_one_copy_of_each_can_be_drawn():
    plots.png(plots.replicas(np.arange(12)[None], 12))


def test_the_overview_holds_all(load, replays, tmp_path):
    figure = plots.overview(load, replays, title="all of it")
    assert len(images(figure)) >= 2
    assert "all of it" in texts(figure)
    file = tmp_path / "overview.png"
    plots.save(figure, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size < 200_000


def test_the_overview_of_many_shows_the_undominated_ones_with_their_sizes(load):
    many = sweep(load, grid([TOPOLOGY, Topology(2, 6)], policy=["greedy", "refined", "incremental"], interval=[1, 2]))
    figure = plots.overview(load, many)
    timeline = figure.subfigs[0].axes[0]
    best = undominated(
        np.asarray([float(replay.moved_experts) for replay in many]),
        np.asarray([replay.mean_balancedness for replay in many]),
    )
    names = [
        f"{r.configuration.label} ({r.configuration.topology.ep_size} x {r.configuration.topology.slots_per_rank})"
        for r in (many[index] for index in best)
    ]
    assert [text.get_text() for text in timeline.texts] == names


def test_pictures_are_the_same_each_time(replays):
    assert plots.png(plots.frontier(replays)) == plots.png(plots.frontier(replays))


def test_a_name_says_the_format(replays, tmp_path):
    figure = plots.frontier(replays)
    plots.save(figure, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(EplbError, match=r"\.png.*got '.*picture.xyz'"):
        plots.save(figure, tmp_path / "picture.xyz")


def test_curves_differ_in_colour_and_marker():
    looks = [(colour(index), marker(index)) for index in range(len(COLOURS) * len(MARKERS))]
    assert len(set(looks)) == len(looks)


def test_colours_differ_in_lightness_or_hue_without_red_or_green():
    """Rough simulation of deuteranopia: the red and green channels are mixed."""
    mixed = []
    for name in COLOURS:
        red, green, blue = (int(name[start : start + 2], 16) / 255 for start in (1, 3, 5))
        mixed.append((0.5 * red + 0.5 * green, 0.5 * red + 0.5 * green, blue))
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(mixed) for b in mixed[:i]]
    assert min(distances) > 0.1


def test_labels_are_spread_as_little_as_need_be():
    assert spread([3.0, 1.0, 2.0], gap=1.0) == [3.0, 1.0, 2.0]
    assert spread([1.0, 1.0, 1.0], gap=0.5) == [0.5, 1.0, 1.5]
    assert spread([], gap=1.0) == []


def test_drawing_needs_no_screen_and_no_pyplot():
    code = (
        "import sys, numpy as np\n"
        "from eplb_core import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.png(plots.replicas(np.arange(4)[None], 4))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
