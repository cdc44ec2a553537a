"""Check a placement policy, an executor or a dispatch of your own; hypothesis strategies and models to do it with.

`check_policy`, `check_executor` and `check_dispatch` raise an `AssertionError` that says which property broke, and in
which layer and slot. `policy_cases`, `move_cases` and `dispatch_cases` draw what they need:

    @given(policy_cases())
    def test_my_policy(case):
        check_policy(my_policy, case)

The models are written for reading: lists, loops and no code of the library. Needs hypothesis.
"""

from eplb_core.testing.cases import DispatchCase, MoveCase, PolicyCase, dispatch_cases, move_cases, policy_cases
from eplb_core.testing.dispatch import check_dispatch
from eplb_core.testing.executor import check_executor
from eplb_core.testing.models import (
    model_apply,
    model_candidates,
    model_fewest_busiest,
    model_greedy,
    model_moved,
    model_pack,
    model_rank_load,
    model_replicate,
    model_slots,
)
from eplb_core.testing.policy import check_policy
from eplb_core.testing.strategies import (
    distinct_loads,
    loads,
    placement_pairs,
    placements,
    read_only,
    token_counts,
    topologies,
)

__all__ = (
    "DispatchCase",
    "MoveCase",
    "PolicyCase",
    "check_dispatch",
    "check_executor",
    "check_policy",
    "dispatch_cases",
    "distinct_loads",
    "loads",
    "model_apply",
    "model_candidates",
    "model_fewest_busiest",
    "model_greedy",
    "model_moved",
    "model_pack",
    "model_rank_load",
    "model_replicate",
    "model_slots",
    "move_cases",
    "placement_pairs",
    "placements",
    "policy_cases",
    "read_only",
    "token_counts",
    "topologies",
)
