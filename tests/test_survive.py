"""Which losses a placement survives, what each leads to, and the picture of it."""

import numpy as np
import pytest

from eplb_core import EplbError, Topology, rebalance, round_robin
from eplb_core.elastic.survive import Loss, dry_run, survivable
from eplb_core.plots.losses import losses
from eplb_core.plots.style import png


def test_windows_count_by_their_sum():
    topology = Topology(2, 3)
    held, load = round_robin(1, 4, topology), np.asarray([[[4, 1, 1, 2]], [[0, 1, 3, 2]]])
    assert dry_run(held, load, topology) == dry_run(held, load.sum(axis=0), topology)


def test_spread_copies_survive_the_loss_of_a_node():
    """With two copies of everything, spread over nodes, any node may go; without, experts are lost."""
    rng = np.random.default_rng(0)
    load, topology = rng.poisson(1000, (3, 16)), Topology(8, 4, num_nodes=2)
    spread = rebalance(load, topology, spread="node")
    copies = [np.bincount(row, minlength=16).min() for row in spread]
    assert min(copies) == 2
    assert survivable(spread, topology).nodes == (0, 1)
    assert survivable(rebalance(load, topology), topology).nodes == ()


def test_what_cannot_be_asked():
    held, load = np.asarray([[0, 1, 1, 0]]), np.asarray([[1, 1]])
    with pytest.raises(EplbError, match="'rank' or 'node'"):
        dry_run(held, load, Topology(2, 2), level="host")
    with pytest.raises(EplbError, match="two of them"):
        dry_run(held, load, Topology(2, 2), level="node")
    with pytest.raises(EplbError, match="two of them"):
        dry_run(held, load, Topology(1, 4))
    with pytest.raises(EplbError, match="4 slots"):
        survivable(held[:, :3], Topology(2, 2))


def test_the_picture_shows_every_loss():
    pytest.importorskip("matplotlib")
    topology = Topology(4, 3)
    held, load = round_robin(2, 8, topology), np.arange(16).reshape(2, 8) + 1
    results = dry_run(held, load, topology)
    figure = losses(results, balancedness=0.9, title="four ranks")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in lower.patches] == [len(loss.lost) for loss in results]
    assert upper.lines[0].get_ydata().tolist() == pytest.approx([loss.balancedness for loss in results])
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["all experts hosted", "before the loss"]
    assert lower.get_xlabel() == "lost rank"
    assert png(figure).startswith(b"\x89PNG")


def test_the_picture_marks_losses_after_which_slots_are_too_few():
    pytest.importorskip("matplotlib")
    results = [Loss((0, 1), ((0, 1),), 0.5, (), 1, 0.8), Loss((2, 3), (), 0.0, ((0, 1),), 1, 0.7)]
    upper, lower = losses(results).axes
    assert [line.get_marker() for line in upper.lines] == ["o", "X"]
    assert [line.get_xdata().tolist() for line in upper.lines] == [[0], [1]]
    assert [bar.get_hatch() for bar in lower.patches] == [None, "//"]
    assert lower.get_xlabel() == "lost node"
