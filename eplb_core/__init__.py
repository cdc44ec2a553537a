"""Expert-parallelism load balancing as pure functions on NumPy and JAX arrays."""

from eplb_core._checks import EMPTY, EplbError, LostExpertsError
from eplb_core.bound import load_bound
from eplb_core.maps import ExpertMaps, derive_maps
from eplb_core.metrics import balancedness, model_balancedness, moved_experts, rank_load
from eplb_core.moves import MovePlan, apply_moves, plan_moves
from eplb_core.placement import check_placement, preserve_slots, round_robin
from eplb_core.policies import rebalance
from eplb_core.rounds import Schedule, schedule_rounds
from eplb_core.topology import Topology
from eplb_core.verify import Violation, verify_plan

__all__ = (
    "EMPTY",
    "EplbError",
    "ExpertMaps",
    "LostExpertsError",
    "MovePlan",
    "Schedule",
    "Topology",
    "Violation",
    "apply_moves",
    "balancedness",
    "check_placement",
    "derive_maps",
    "load_bound",
    "model_balancedness",
    "moved_experts",
    "plan_moves",
    "preserve_slots",
    "rank_load",
    "rebalance",
    "round_robin",
    "schedule_rounds",
    "verify_plan",
)
