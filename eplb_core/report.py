"""A report of a simulation as one HTML file that needs nothing else: figures, pictures, prices, definitions."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Int

from eplb_core import plots
from eplb_core.advise.advice import Advice, explain
from eplb_core.costs import Costs, transfer_matrix
from eplb_core.moves import plan_moves
from eplb_core.rounds import schedule_rounds
from eplb_core.simulate import balancedness_bound
from eplb_core.simulate.replay import Replay, gain
from eplb_core.units import in_units

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
.advice { border-left: .4rem solid #0072B2; background: #f3f7fa; padding: .8rem 1rem }
.advice.no { border-color: #D55E00; background: #fdf5ef }
.wide { overflow-x: auto }
table { font-size: .95rem; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 }
img { max-width: 100%; height: auto }
figcaption { color: #555; font-size: .92rem; max-width: 48rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem }
dt { font-weight: 600 }
dd { margin: 0 }
footer { margin-top: 3rem; color: #666; font-size: .9rem }
"""


def report(
    load: Int[Any, "windows layers logical"],
    replays: Sequence[Replay],
    *,
    title: str,
    facts: dict[str, Any] | None = None,
    advice: Advice | None = None,
) -> str:
    """Write a report of replays of one trace on one topology.

    Args:
        load: `[windows, layers, logical]` the trace.
        replays: with all their placements; the first is what the others' gains are measured against.
        title: heading of the page.
        facts: what is known of the trace, by name.
        advice: of `advise`, put first.

    Returns:
        HTML, with pictures inside; no scripts, and nothing is loaded from elsewhere. The same input gives the same
        text but for planning times.
    """
    topology = replays[0].configuration.topology
    nodes = f" on {topology.num_nodes} nodes" if topology.num_nodes > 1 else ""
    slots = f"{topology.slots_per_rank} slots each, {topology.num_slots - load.shape[2]} redundant experts"
    sizes = {
        "Trace": f"{load.shape[0]} windows, {load.shape[1]} layers, {load.shape[2]} experts",
        "Ranks": f"{topology.ep_size}{nodes}, {slots}",
    }
    parts = [
        f"<h1>{escape(title)}</h1>",
        _definitions(sizes | (facts or {})),
        "" if advice is None else _advice(advice),
        "<h2>What each policy does</h2>",
        _results(load, replays),
        *_pictures(load, replays),
        "<h2>What was assumed</h2>",
        _definitions(_prices(replays[0].costs)),
        "<h2>What the words mean</h2>",
        _definitions(WORDS),
        "<footer>Made by eplb.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


WORDS = {
    "Balancedness": "Mean rank load over the busiest rank's load, per layer: 1 is best. Here the mean over layers and "
    "windows, each window under the placement that was made before it.",
    "Bound": "Balancedness that no placement in these slots could exceed.",
    "Experts moved": "(Layer, rank, expert) that a rank had to receive.",
    "Path": "The critical path: the time of the busiest rank of each layer, added up, and that of the moves unless "
    "they are overlapped.",
    "Gain": "Share of the critical path of the first row that is saved. The interval is a block bootstrap's over "
    "windows, at 95 %. Where expert layers are half of a step, half of the gain arrives.",
    "Static": "The round-robin placement, never changed.",
}


def _advice(advice: Advice) -> str:
    kind = "advice" if advice.recommend else "advice no"
    return f'<h2>Advice</h2>\n<p class="{kind}">{escape(explain(advice))}</p>'


def _results(load: Any, replays: Sequence[Replay]) -> str:
    heads = ("", "balancedness", "experts moved", "moved", "moves, s", "path, s", "gain", "95 % interval")
    rows = []
    for index, replay in enumerate(replays):
        saved = gain(replay, replays[0])
        ends = f"{saved.low:+.1%} to {saved.high:+.1%}" if np.isfinite(saved.low) else "too few windows"
        rows.append(
            [
                replay.configuration.label,
                f"{replay.mean_balancedness:.3f}",
                f"{replay.moved_experts:,}",
                in_units(replay.bytes_moved),
                f"{replay.migration_seconds.sum():.3g}",
                f"{replay.critical_path_seconds.sum():.4g}",
                *(["", ""] if index == 0 else [f"{saved.share:+.1%}", ends]),
            ]
        )
    bound = balancedness_bound(load, replays[0].configuration.topology).mean()
    rows.append(["bound", f"{bound:.3f}", *[""] * 6])
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _pictures(load: Any, replays: Sequence[Replay]) -> list[str]:
    best = min(replays, key=lambda replay: replay.critical_path_seconds.sum())
    name, topology = best.configuration.label, best.configuration.topology
    bound = balancedness_bound(load, topology).mean(axis=1)
    start, end = best.configuration.first_placement(*load.shape[1:]), best.placements[-1]
    found = [
        _figure(
            "Balancedness over time",
            plots.timeline(replays, bound=bound),
            "Above: mean balancedness of the layers in each window. A marker is a rebalance that moved something, at "
            "the first window under the new placement. Below: experts that it moved.",
        ),
        _figure(
            "Balance against moves",
            plots.frontier(replays),
            "Each point is a row of the table, with its confidence interval. Up and left is better; the grey line "
            "joins those that no other beats in both.",
        ),
        _figure(
            "Load of every rank",
            plots.rank_loads(start, end, load[-1], topology, titles=("round-robin", name)),
            f"The last window under the placement at the start and under the last one of {name}. 1 is a rank with the "
            "mean load of its layer; the brightest rank of a row sets the pace of that layer.",
        ),
        _figure(
            "Copies of every expert",
            plots.replicas(end, load.shape[2], title=name),
            f"In the last placement of {name}. Experts with more copies are those with most tokens.",
        ),
    ]
    if len(best.placements) > 1:
        plan = plan_moves(best.placements[-2], end, topology)
        sent = transfer_matrix(schedule_rounds(plan, topology), topology)
        picture = plots.transfers(sent, topology, bytes_per_expert=best.costs.bytes_per_expert, title="last plan")
        caption = f"What each rank sends to each other in the last plan of {name}, all layers together."
        found.append(_figure("Transfers of one plan", picture, caption))
    return found


def _figure(heading: str, figure: Any, caption: str) -> str:
    image = base64.b64encode(plots.png(figure)).decode("ascii")
    return (
        f"<h2>{escape(heading)}</h2>\n<figure>\n"
        f'<img alt="{escape(heading)}. {escape(caption)}" src="data:image/png;base64,{image}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _definitions(values: dict[str, Any]) -> str:
    rows = "\n".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>\n{rows}\n</dl>"


def _prices(costs: Costs) -> dict[str, str]:
    links = asdict(costs.links)
    return {
        "One expert of one layer": in_units(costs.bytes_per_expert),
        "One expert, one token": f"{costs.seconds_per_token * 1e6:g} µs",
        "Tokens served for each one in the trace": f"{costs.scale:g}",
        "A rank sends and receives": f"{in_units(links['within_node'])}/s within a node, "
        f"{in_units(links['across_nodes'])}/s across nodes, {links['latency'] * 1e6:g} µs per round",
        "Moves": "overlapped with serving, at no time" if costs.overlapped else "stop serving",
    }
