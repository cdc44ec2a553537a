"""The models that one process hosts part of, and how they follow a plan of their group."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Real

from eplb_core._checks import listing, require
from eplb_core.elastic.plan import ElasticPlan
from eplb_torch.balancer import ExpertBalancer
from eplb_torch.elastic.carry_out import MoveOptions, ReadRow, carry_out, check_plan
from eplb_torch.elastic.holdings import Holdings, Told, gather_holdings, heard, own_slots
from eplb_torch.elastic.members import Members, MembersLost
from eplb_torch.live_model import ElasticModel
from eplb_torch.report import RearrangeError
from eplb_torch.transport import Transport

_DONE, _FAILED = b"\x01", b"\x00"

ReadRows = ReadRow | Mapping[str, ReadRow] | None
"""For all models, or by name."""

Loads = Mapping[str, Real[Any, "layers logical"]]
"""By model, tokens per expert."""

MakePlan = Callable[[Holdings, int | None], ElasticPlan]
"""`(holdings, slots_per_rank or None for as many as now) -> plan`."""


class Hosting:
    """Models by name, and for each the rank by which this process's slots are found in its placement.

    Args:
        models: one, which is called `"main"`, or several by name.
        rank: of this process in the models' placements.
        resize: as for `ElasticGroup`.
        options: of the moves.
    """

    def __init__(
        self,
        models: ElasticModel | Mapping[str, ElasticModel],
        rank: int,
        resize: bool,
        options: MoveOptions,
    ):
        self.models: dict[str, ElasticModel] = dict(models) if isinstance(models, Mapping) else {"main": models}
        self._resize, self._options = resize, options
        self._seats = dict.fromkeys(self.models, rank)
        self._held: dict[str, np.ndarray] = {}

    def loads(self, given: Loads | None, balancer: ExpertBalancer | None) -> dict[str, np.ndarray]:
        """The load to plan each model for: as given, or as the balancer foresees it, or none.

        Raises:
            EplbError: if a load does not fit its model.
        """
        loads = {}
        for name, model in self.models.items():
            shape = (model.weights.num_layers, model.num_logical)
            if given is not None and name in given:
                load = np.asarray(given[name])
            elif balancer is not None and name in balancer.models:
                load = balancer.forecast(name)
            else:
                load = np.zeros(shape)
            require(
                load.shape == shape,
                f"`loads` must be `[layers, logical]` = {shape} for {name!r}",
                f"shape={load.shape}",
                "Count tokens per logical expert.",
            )
            loads[name] = load.astype(np.float64)
        return loads

    def plan(
        self,
        loads: Loads,
        transport: Transport,
        members: Members,
        read_row: ReadRows,
        make_plan: MakePlan,
        balancer: ExpertBalancer | None = None,
    ) -> dict[str, ElasticPlan]:
        """Plan from what all ranks hold. A collective; the plans, or the error, are the same on all ranks.

        Args:
            loads: of this rank.
            transport, members: of the group.
            read_row: as for `ElasticGroup`.
            make_plan: for one model.
            balancer: that was halted, if there is one: what it holds back is settled here.

        Raises:
            TransportError: if a rank was not heard.
            EplbError: if a model's experts cannot all be hosted; see `check_plan`.
        """
        mine = {name: self._tell(name, loads[name], balancer) for name in self.models}
        holdings, chosen = gather_holdings(mine, transport, members.num_nodes, self._options.timeout)
        for name, told in mine.items():
            self._settle(name, told, chosen[name], balancer)
        plans = {name: make_plan(held, None) for name, held in holdings.items()}
        for name, plan in plans.items():
            if plan.unhosted and self._resize:
                plans[name] = make_plan(holdings[name], plan.min_slots_per_rank)
        for name, plan in plans.items():
            check_plan(plan, _reader(read_row, name))
        return plans

    def carry_out(
        self,
        plans: Mapping[str, ElasticPlan],
        group: dist.ProcessGroup,
        transport: Transport,
        members: Members,
        read_row: ReadRows,
    ) -> None:
        """Bring all models to their plans, and hear from all ranks that they did so. A collective.

        Raises:
            RearrangeError: if rows could not be moved.
            MembersLost: if another rank could not read its rows, which will leave.
            Exception: whatever `read_row` raised here. This process must leave.
        """
        failure: Exception | None = None
        for name, plan in plans.items():
            model, self._seats[name] = self.models[name], transport.rank
            if plan.group.slots_per_rank > model.weights.slots_per_rank:
                model.resize(plan.group.slots_per_rank)
            self._held.pop(name, None)
            options = {"epoch": members.generation, "read_row": _reader(read_row, name)}
            try:
                carry_out(plan, model, group, transport, self._options, **options)
            except RearrangeError:
                raise
            except Exception as error:  # the others hear of it when all models are done
                failure = failure or error
        payloads = heard(transport, _DONE if failure is None else _FAILED, self._options.timeout)
        if failure is not None:
            raise failure
        failed = tuple(name for name, done in zip(members.names, payloads, strict=True) if done != _DONE)
        if failed:
            raise MembersLost(f"{listing(failed)} could not reload experts", failed)

    def facts(self) -> str:
        """What must be equal on all ranks, in a line of JSON."""
        return json.dumps({name: _describe(model) for name, model in self.models.items()})

    def follow(self, facts: str) -> None:
        """Be like a group that this process is about to join: have as many slots.

        Raises:
            EplbError: if the models are others than the group's.
        """
        theirs, mine = json.loads(facts), json.loads(self.facts())
        for name in theirs.keys() & mine.keys():
            slots = theirs[name]["slots_per_rank"]
            if slots > mine[name]["slots_per_rank"]:
                self.models[name].resize(slots)
        mine = json.loads(self.facts())
        odd = sorted(name for name in theirs.keys() | mine.keys() if theirs.get(name) != mine.get(name))
        require(
            not odd,
            "`ElasticGroup.join(models=...)` must be the models of the group",
            "; ".join(f"{name!r}: {mine.get(name)}, where the group has {theirs.get(name)}" for name in odd),
            "Load the same models with the same number of slots per rank.",
        )

    def _tell(self, name: str, load: np.ndarray, balancer: ExpertBalancer | None) -> Told:
        model, seat = self.models[name], self._seats[name]
        if name in self._held:
            return Told(self._held[name], self._held[name], load)
        now, later = model.placement, None if balancer is None else balancer.held_back(name)
        held, held_back = (own_slots(p, model.topology, seat) for p in (now, now if later is None else later))
        return Told(held.astype(np.int32), held_back.astype(np.int32), load)

    def _settle(self, name: str, told: Told, chosen: np.ndarray, balancer: ExpertBalancer | None) -> None:
        """Commit in the slots that are chosen, and remember what they hold until the model is regrouped."""
        self._held[name] = np.where(chosen, told.held_back, told.held)
        if balancer is not None and name in balancer.models:
            model, seat = self.models[name], self._seats[name]
            everywhere = np.zeros((len(chosen), model.topology.num_slots), dtype=bool)
            own_slots(everywhere, model.topology, seat)[:] = chosen
            balancer.settle(everywhere, name)


def _reader(read_row: ReadRows, name: str) -> ReadRow | None:
    return read_row.get(name) if isinstance(read_row, Mapping) else read_row


def _describe(model: ElasticModel) -> dict[str, Any]:
    return {
        "layers": model.weights.num_layers,
        "num_logical": model.num_logical,
        "slots_per_rank": model.weights.slots_per_rank,
        "layout": hashlib.blake2b(model.weights.layout().encode(), digest_size=8).hexdigest(),
    }
