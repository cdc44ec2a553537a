"""`eplb verify`: whether placements and move plans keep their promises."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eplb_core.commands._shared import JsonFile, console, examples, fail, failing, topology_of, write_json

if TYPE_CHECKING:
    import numpy as np

    from eplb_core.topology import Topology

EPILOG = examples(
    "eplb verify placement.npz",
    "eplb verify init.json expert_map.json --ranks 8",
    "eplb verify next.npz --previous placement.npz",
    "eplb verify moves.npz",
)
_SHOWN = 20


def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Placements of any format, or move plans.")],
    previous: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also plan and check the moves from this placement.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks, where the file does not state them.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, where the file does not state them.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts, where the file does not state them; else the largest id + 1.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check placements and move plans.

    A placement must give every expert of every layer a slot. Copies that share a rank with another copy of the same
    expert, and empty slots, are warnings. A move plan must turn its old placement into its new one; every slot, message
    and round is checked by code that the planner does not share.

    Exits with 1 if a rule is broken, with 2 if a file cannot be read.
    """
    with failing("verify"):
        from eplb_core._checks import require

        require(
            previous is None or len(files) == 1,
            "`--previous` must come with one placement",
            f"{len(files)} files",
            "Verify one at a time.",
        )
        reports = [_report(file, previous, ranks, nodes, experts) for file in files]
    to = console(json_file)
    for report in reports:
        to.print(f"{report['file']}: {report['summary']}")
        for kind in ("violations", "warnings"):
            for text in report[kind][:_SHOWN]:
                to.print(f"  {kind[:-1]}: {text}")
            if len(report[kind]) > _SHOWN:
                to.print(f"  and {len(report[kind]) - _SHOWN} more {kind}")
    write_json(json_file, {"files": reports})
    if any(report["violations"] for report in reports):
        fail("eplb verify: rules are broken.", code=1)


def _report(file: Path, previous: Path | None, ranks: Any, nodes: Any, experts: Any) -> dict[str, Any]:
    from eplb_core.formats.arrays import names_of
    from eplb_core.trace import read_placement, read_plan

    if file.suffix == ".npz" and "source_slot" in names_of(file):
        return {"file": str(file), "kind": "move plan"} | _plan_report(*read_plan(file))
    stored = read_placement(file)
    ids, info = stored.physical_to_logical, stored.info
    topology = topology_of(ids, ranks or info.get("ep_size"), nodes or info.get("num_nodes"))
    num_logical = experts or info.get("num_logical") or max(int(ids.max()) + 1, 1)
    report = _placement_report(ids, topology, num_logical)
    if previous is not None and not report["violations"]:
        found = _moves_report(read_placement(previous).physical_to_logical, ids, topology)
        report = {key: report[key] + found[key] for key in ("summary", "violations", "warnings")}
    return {"file": str(file), "kind": "placement", "format": info["format"]} | report


def _placement_report(ids: "np.ndarray", topology: "Topology | None", num_logical: int) -> dict[str, Any]:
    from eplb_core._checks import EMPTY, EplbError
    from eplb_core.placement import check_placement
    from eplb_core.topology import Topology

    violations, warnings = [], []
    try:
        check_placement(ids, topology or Topology(1, ids.shape[1]), num_logical)
    except EplbError as error:
        violations.append(str(error))
    empty = int((ids == EMPTY).sum())
    if empty:
        warnings.append(f"{empty} empty slots")
    shared = 0 if topology is None else _shared_ranks(ids, topology)
    if shared:
        warnings.append(f"{shared} copies share a rank with another copy of their expert; they relieve nobody")
    if topology is None:
        warnings.append("the number of ranks is unknown; copies per rank were not looked at (--ranks)")
    summary = f"placement of {num_logical} experts in {ids.shape[1]} slots, {len(ids)} layers"
    return {"summary": summary, "violations": violations, "warnings": warnings}


def _shared_ranks(ids: "np.ndarray", topology: "Topology") -> int:
    """Count copies beyond the first of an expert on a rank."""
    import numpy as np

    from eplb_core._checks import EMPTY

    by_rank = np.sort(ids.reshape(len(ids), topology.ep_size, topology.slots_per_rank), axis=2)
    return int(((by_rank[..., 1:] == by_rank[..., :-1]) & (by_rank[..., 1:] != EMPTY)).sum())


def _moves_report(old: "np.ndarray", new: "np.ndarray", topology: "Topology | None") -> dict[str, Any]:
    from eplb_core._checks import LostExpertsError, require
    from eplb_core.moves import plan_moves
    from eplb_core.rounds import schedule_rounds

    require(topology is not None, "`--previous` must come with the ranks", "none", "Add --ranks.")
    assert topology is not None
    try:
        planned = plan_moves(old, new, topology)
    except LostExpertsError as error:
        return {"summary": "", "violations": [str(error)], "warnings": []}
    report = _plan_report(old, new, planned, topology, schedule_rounds(planned, topology))
    return report | {"summary": f"; {report['summary']}"}


def _plan_report(old: Any, new: Any, planned: Any, topology: "Topology", schedule: Any) -> dict[str, Any]:
    from eplb_core.metrics import moved_experts
    from eplb_core.verify import verify_plan

    found = verify_plan(old, new, planned, topology, schedule)
    summary = f"{int(moved_experts(old, new, topology).sum())} experts to move between {topology.ep_size} ranks"
    if schedule is not None:
        summary += f" in {schedule.num_rounds} rounds"
    places = [f"layer {v.layer}, slot {v.slot}: " if v.layer >= 0 else "" for v in found]
    violations = [f"{place}{v.kind}: {v.detail}" for place, v in zip(places, found, strict=True)]
    return {"summary": summary, "violations": violations, "warnings": []}
