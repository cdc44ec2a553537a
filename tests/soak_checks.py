"""What must come of a fault according to the documentation, of what all ranks tell of it."""

from typing import Any

from tests.soak_faults import Fault


def check_move(fault: Fault, records: list[dict[str, Any]], old: list, new: list) -> list[str]:
    """What is not as documented, of what all ranks tell of one rearrangement."""
    others = [record for rank, record in enumerate(records) if rank != fault.victim or not fault.loses]
    happened = any(record["fired"] for record in records) or fault.kind in ("veto", "plan", "epoch", "shape")
    errors = {record["kind"] for record in others}
    expected = {None}
    if fault.kind == "shape":
        expected = {"EplbError"}
    elif happened and fault.refuses:
        expected = {"RearrangeError"}
    elif fault.kind in ("abort", "drain") or (happened and fault.loses):
        expected = errors if len(errors) == 1 and errors <= {None, "RearrangeError"} else {"the same on all"}
    lost = [fault.victim] if fault.loses else []
    held = [record["held"] for record in others]
    stays_old = fault.kind in ("plan", "epoch", "shape")
    checks = {
        "slots hold other rows than the placement says": not any(record["wrong"] for record in records),
        "survivors hold different placements": all(placement == held[0] for placement in held),
        f"errors {errors} where {expected} were due": errors == expected,
        "lost ranks that are alive": all(set(record["lost"]) <= set(lost) for record in others),
        "survivors do not know that they agree": all(record["agreed"] for record in others),
        "moved though it was refused": not stays_old or held[0] == old,
        "not moved though nothing stopped it": errors != {None} or fault.kind in ("abort", "drain") or held[0] == new,
        "an error, and nothing left": all(record["left"] for record in others if record["kind"] == "RearrangeError"),
        "layers switched at different boundaries": all(r["switched"] == others[0]["switched"] for r in others),
        # A rank that is lost after all votes have been heard lets that group of layers be committed, and the next fail.
        "later than 1.5 times the timeout": all(r["seconds"] < 2 * 1.5 * fault.timeout() + 4.0 for r in others),
        "no rank says that rows arrived damaged": not (happened and fault.kind == "corrupt")
        or any("arrived damaged" in record["text"] for record in records),
    }
    return [text for text, is_kept in checks.items() if not is_kept]


def check_balance(fault: Fault, records: list[dict[str, Any]]) -> list[str]:
    """What is not as documented, of what all ranks tell of one balancer."""
    others = [record for rank, record in enumerate(records) if rank != fault.victim or not fault.loses]
    happened = any(record["fired"] for record in records)
    errors = [record["errors"] for record in others]
    problems = []
    if any(record["held"] != others[0]["held"] for record in others):
        problems.append("survivors hold different placements")
    if not all(record["known"] for record in records):
        problems.append("the controller believes in another placement than the model, or in a target that is given up")
    if any(record["switched"] != others[0]["switched"] for record in others):
        problems.append("layers switched at different boundaries")
    if fault.loses and happened:
        if not any(record["failure"] for record in records):
            problems.append("a rank was lost, and no balancer has ended")
        return problems
    if any(record["failure"] for record in records):
        problems.append("a balancer has ended, though no rank was lost")
    if any(error != errors[0] for error in errors):
        problems.append("ranks raised different errors")
    expected: set[str] = set()
    if fault.kind in ("fail", "corrupt") and happened:
        expected = {"RearrangeError"}
    if fault.kind in ("planner", "policy"):
        expected = {"PlanningError"}
    # What fails while it is stopped is an error only where it has failed.
    closing = {error for record in records for error in record["closing"]}
    found = set(errors[0]) | closing
    if found != expected and not (fault.kind == "policy" and not found):  # two policies may agree
        problems.append(f"errors {found} where {expected} were due")
    if expected == {"RearrangeError"} and len(errors[0]) + bool(closing) != 1:
        problems.append("one fault was more than one error")
    return problems
