"""A group of ranks that survives losses, lets others in, and lets members go."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch.distributed as dist

from eplb_core._checks import listing, require
from eplb_core.elastic import shrink
from eplb_core.elastic.plan import ElasticPlan
from eplb_torch.balancer import ExpertBalancer
from eplb_torch.elastic.brittle_transport import BrittleTransport
from eplb_torch.elastic.carry_out import MoveOptions
from eplb_torch.elastic.change import Change, describe_change, suspects_of
from eplb_torch.elastic.connections import Connections
from eplb_torch.elastic.groups import MakeGroup, form_group
from eplb_torch.elastic.holdings import Holdings
from eplb_torch.elastic.hosting import Hosting, Loads, ReadRows
from eplb_torch.elastic.losses import is_loss
from eplb_torch.elastic.members import Evicted, Members, MembershipError, MembersLost
from eplb_torch.elastic.membership import Membership
from eplb_torch.live_model import ElasticModel
from eplb_torch.report import RearrangeError
from eplb_torch.transport import ProcessGroupTransport

__all__ = ("Change", "ElasticGroup", "Evicted", "Members", "MembersLost", "Membership", "MembershipError", "is_loss")

logger = logging.getLogger(__name__)

_MOST_ATTEMPTS = 20  # generations in a row that break before they serve
_POLL_SECONDS = 0.05


class ElasticGroup:
    """What a serving loop holds to live through changes of its group.

        elastic = ElasticGroup(Membership(store), read_row=checkpoint)
        elastic.found(rank, size)
        experts = expert_parallel(model, topology, group=elastic.group)
        elastic.serve(experts)
        balancer = ExpertBalancer(experts, elastic.transport, config)
        while serving:
            try:
                serve_one_forward()
                balancer.step(load)
            except Exception as error:
                if not is_loss(error):
                    raise
                elastic.recover(error, balancer=balancer)
                balancer = balancer.renewed(elastic.transport)

    A process that is to join does `elastic.join(joining_experts(model, slots_per_rank), timeout)` instead of the first
    lines. `admit` and `release` are for members that come and go as planned.

    Every change ends with one generation of members in which every expert has a copy, or with an error. Ranks that are
    lost on the way only add a generation. What was committed anywhere is never given up: after each failure the next
    plan is made from what every rank says that its own slots hold.

    Args:
        membership: of this process, in no group yet.
        read_row: where rows come from that no rank holds, `(layer, name, expert) -> row`; with several models a dict
            of these by name. Without it the loss of the last copy of an expert is an error.
        resize: whether models may get more slots per rank when there are too few ranks left for all experts.
        timeout: seconds that each step between ranks may take: connecting, telling, moving the rows of one part. The
            balancer's timeout must not be longer.
        group_timeout: of `group`, in seconds: after this a forward notices a rank that hangs.
        max_staging_bytes, checksum: as for `rearrange`.
        max_extra_moves: as for `eplb_core.elastic.grow`.
        make_group: connects the ranks; `functools.partial(form_group, device="cuda")` for NCCL, which is not verified.

    Attributes:
        membership: as given.
        read_row: as given; may be set later, to recover from an error for want of it.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        read_row: ReadRows = None,
        resize: bool = False,
        timeout: float = 30.0,
        group_timeout: float = 60.0,
        max_staging_bytes: int = 256 * 2**20,
        checksum: bool = False,
        max_extra_moves: int | None = None,
        make_group: MakeGroup = form_group,
    ):
        for name, value in (("timeout", timeout), ("group_timeout", group_timeout)):
            require(
                0 < value < float("inf"),
                f"`ElasticGroup({name}=...)` must be finite and > 0 seconds",
                f"{name}={value}",
                "Nothing here waits forever.",
            )
        self.membership, self._max_extra_moves = membership, max_extra_moves
        self._connections = Connections(membership, timeout, group_timeout, make_group)
        self.read_row, self._resize = read_row, resize
        self._options = MoveOptions(timeout, max_staging_bytes, checksum)
        self._hosting = Hosting({}, 0, resize, self._options)

    @property
    def members(self) -> Members:
        """The members of the generation that this process is in."""
        return self.membership.members

    @property
    def group(self) -> dist.ProcessGroup:
        """For the tokens of the models, in this generation.

        Raises:
            EplbError: before `found` or `join`.
        """
        return self._connections.group

    @property
    def transport(self) -> ProcessGroupTransport:
        """For moving weights, in this generation: for the balancer.

        Raises:
            EplbError: before `found` or `join`.
        """
        return self._connections.transport

    @property
    def models(self) -> dict[str, ElasticModel]:
        """By name; none before `serve` or `join`."""
        return self._hosting.models

    def found(self, rank: int, size: int) -> Members:
        """Be one of the first members; see `Membership.found`. A collective of all.

        Raises:
            MembershipError: if not all came.
            TransportError: if they could not be connected.
        """
        members = self.membership.found(rank, size)
        self._connections.connect()
        return members

    def serve(self, models: ElasticModel | Mapping[str, ElasticModel]) -> None:
        """Say which models the group serves, built for `group`. Every member calls it once.

        Raises:
            EplbError: if a model is of a group of another size.
        """
        hosting = self._host(models, self.members.rank)
        for name, model in hosting.models.items():
            require(
                model.topology.ep_size == self.members.size,
                "`ElasticGroup.serve(models=...)` must be models of this group",
                f"ep_size={model.topology.ep_size} of {name!r}, members={self.members.size}",
                "Build them with group=elastic.group.",
            )
        self._hosting = hosting
        self.membership.tell(hosting.facts())

    def join(self, models: ElasticModel | Mapping[str, ElasticModel], timeout: float) -> Change:
        """Ask to be let in, wait for it, and receive experts. Afterwards the models serve.

        Args:
            models: whose slots hold nothing, such as `joining_experts` makes.
            timeout: seconds to wait for a group, and for it to let this process in.

        Raises:
            EplbError: if the models are not those of the group.
            MembershipError: if nobody let this process in.
        """
        deadline, hosting = time.monotonic() + timeout, self._host(models, 0)
        hosting.follow(self._facts_of_the_group(deadline))
        self._hosting = hosting
        self.membership.join(max(deadline - time.monotonic(), _POLL_SECONDS))
        return self._change(hosting.loads(None, None), self._max_extra_moves, is_new=True)

    def waiting(self) -> tuple[str, ...]:
        """Look who wants to join; see `Membership.waiting`. Let one rank look now and then, and tell the others."""
        return self.membership.waiting()

    def recover(
        self,
        error: BaseException | None = None,
        *,
        balancer: ExpertBalancer | None = None,
        loads: Loads | None = None,
    ) -> Change:
        """Go on with whoever is left, after an error that `is_loss`. Afterwards the models serve again.

        Breaks this generation's groups, so that the others notice at once. Requests that were under way must be
        served anew.

        Args:
            error: what has happened, as it may name the ranks.
            balancer: that uses `transport`; halted here. Go on with `balancer.renewed(elastic.transport)`.
            loads: by model, tokens per expert `[layers, logical]` that this rank knows of, to plan for; by default
                what the balancer foresees.

        Raises:
            LostExpertsError: if no rank holds an expert, and there is no `read_row`. No weights have moved.
            EplbError: if there are too few slots, and `resize` is False. No weights have moved.
            Evicted: if the others went on without this process: stop.
            MembershipError: if there was no agreement.
        """
        suspects, known = suspects_of(error, self.members), self._hosting.loads(loads, balancer)
        self._connections.break_tokens()
        if balancer is not None:
            balancer.halt()
        self._connections.break_all()
        return self._change(known, self._max_extra_moves, suspects, balancer=balancer)

    def admit(
        self, names: Sequence[str], *, balancer: ExpertBalancer | None = None, loads: Loads | None = None
    ) -> Change:
        """Let processes in that are `waiting`. Every member calls it at the same boundary, with the same names.

        If a newcomer dies meanwhile the group goes on without it.

        Args:
            names: of those to let in.
            balancer, loads: as for `recover`; the balancer is drained.

        Raises:
            RearrangeError, TransportError, TimeoutError: if draining the balancer failed: recover.
            EplbError, MembershipError: as `recover`.
        """
        known = self._drain(balancer, loads)
        return self._change(known, self._max_extra_moves, joining=names)

    def release(
        self, names: Sequence[str], *, balancer: ExpertBalancer | None = None, loads: Loads | None = None
    ) -> Change | None:
        """Let members go, once the others hold all experts. Every member, also those, calls it at the same boundary.

        Args:
            names: of those who leave.
            balancer, loads: as for `recover`; the balancer is drained.

        Returns:
            As `recover`; None on a rank that has left, which may end its process.

        Raises:
            RearrangeError, TransportError, TimeoutError: if ranks were lost meanwhile: recover. The leaving are
                members still.
            EplbError, MembershipError: as `recover`. If there are too few slots, nothing has changed.
        """
        unknown = sorted(set(names) - set(self.members.names))
        require(
            not unknown and len(set(names)) < self.members.size,
            "`ElasticGroup.release(names=...)` must be members, and not all",
            f"{listing(unknown)} unknown" if unknown else "all of them",
            "Name those of `members.names` that leave.",
        )
        known = self._drain(balancer, loads)
        leaving = [self.members.names.index(name) for name in dict.fromkeys(names)]

        def plan(holdings: Holdings, slots: int | None) -> ElasticPlan:
            return shrink(*holdings, leaving, slots_per_rank=slots, max_extra_moves=self._max_extra_moves)

        plans = self._hosting.plan(known, self.transport, self.members, self.read_row, plan)
        self._carry_out(plans)
        if self.membership.name in names:
            self.close()
            return None
        change = self._change(known, 0, leaving=names)
        return change._replace(plans=plans) if change.attempts == 1 else change

    def close(self) -> None:
        """Leave without a word: to the others this process is lost, or has been released."""
        self.membership.leave()
        self._connections.break_all()

    def _change(
        self,
        loads: Loads,
        max_extra_moves: int | None,
        suspects: Collection[str] = (),
        *,
        joining: Sequence[str] = (),
        leaving: Collection[str] = (),
        balancer: ExpertBalancer | None = None,
        is_new: bool = False,
    ) -> Change:
        """Agree, connect and move until one generation has done it all."""
        before = tuple(name for name in self.members.names if not is_new or name != self.membership.name)

        def plan(holdings: Holdings, slots: int | None) -> ElasticPlan:
            return holdings.plan(slots, max_extra_moves=max_extra_moves)

        start = time.monotonic()
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            clock = [time.monotonic()]
            try:
                if attempt > 1 or not is_new:
                    self.membership.renew(suspects=suspects, joining=joining, leaving=leaving)
                    self._connections.break_all()  # not before: of a planned change others may not know yet
                clock.append(time.monotonic())
                self._connections.connect()
                clock.append(time.monotonic())
                plans = self._hosting.plan(loads, self.transport, self.members, self.read_row, plan, balancer)
                self._carry_out(plans)
            except Exception as error:
                if not is_loss(error) or attempt == _MOST_ATTEMPTS:
                    raise
                logger.warning("%s: generation %d broke: %s", self.membership.name, self.members.generation, error)
                suspects = suspects_of(error, self.members)
                self._connections.break_all()
                continue
            clock.append(time.monotonic())
            self.membership.tell(self._hosting.facts())
            phases = np.diff(clock).tolist()
            return describe_change(before, self.members, plans, attempt, phases, clock[-1] - start)
        raise AssertionError("unreachable")

    def _carry_out(self, plans: Mapping[str, ElasticPlan]) -> None:
        try:
            transport = BrittleTransport(self.transport)
            self._hosting.carry_out(plans, self.group, transport, self.members, self.read_row)
        except RearrangeError:
            raise
        except Exception as error:
            if not is_loss(error):
                self.close()  # the failure is this rank's alone: the others go on
            raise

    def _drain(self, balancer: ExpertBalancer | None, loads: Loads | None) -> dict[str, np.ndarray]:
        known = self._hosting.loads(loads, balancer)
        if balancer is not None:
            balancer.drain()
        return known

    def _host(self, models: ElasticModel | Mapping[str, ElasticModel], rank: int) -> Hosting:
        return Hosting(models, rank, self._resize, self._options)

    def _facts_of_the_group(self, deadline: float) -> str:
        while time.monotonic() < deadline:
            names = self.membership.latest()
            facts = self.membership.told(names[0]) if names else None
            if facts is not None:
                return facts
            time.sleep(_POLL_SECONDS)
        raise MembershipError(f"there was no group to join in time; members {listing(self.membership.latest())}")
