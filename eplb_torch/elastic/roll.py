"""The lists of members in a store: how each is agreed on. Calls wait for the store as long as it takes."""

import json
import time
from collections.abc import Collection, Sequence

from torch.distributed.distributed_c10d import Store

from eplb_core._checks import listing
from eplb_torch.elastic.members import Evicted, Members, MembershipError, MembersLost
from eplb_torch.elastic.pulse import Watch

_POLL_SECONDS = 0.02


class Roll:
    """One process's part in writing the list of each generation. See `Membership`, which adds deadlines.

    Keys: `node/<name>`; `rank/<i>` names of the first members; `joins` how many have asked, `join/<i>` their names;
    `<g>/begun`, `<g>/here/<name>` who takes part in agreeing on generation g; `<g>/list` the agreement;
    `<g>/met/<what>/<name>`.

    Args:
        store: as for `Membership`.
        name, node: of this process.
        silence, timeout: as for `Membership`.
    """

    def __init__(self, store: Store, name: str, node: str, silence: float, timeout: float):
        self._store, self._name, self._silence, self._timeout = store, name, silence, timeout
        self._watch = Watch(store, silence)
        self._joins_seen, self._unread, self._asked = 0, set[int](), list[str]()
        store.set(f"node/{name}", node)

    def found(self, rank: int, size: int) -> Members:
        """Wait for all of the first members, then write generation 0 with the others."""
        deadline, keys = time.monotonic() + self._timeout, [f"rank/{i}" for i in range(size)]
        self._store.set(keys[rank], self._name)
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = [i for i, key in enumerate(keys) if not self._store.check([key])]
                raise MembershipError(f"ranks {listing(missing)} did not come in {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)
        self._propose(0, [self._text(key) for key in keys])
        return self._decided(0)

    def join(self, timeout: float) -> Members:
        """Ask, and wait for a list with this process in it."""
        deadline, generation = time.monotonic() + timeout, 0
        self._store.set(f"join/{self._store.add('joins', 1)}", self._name)
        while time.monotonic() < deadline:
            while self._store.check([_list(generation)]):
                if any(name == self._name for name, _ in self._read(generation)):
                    return self._decided(generation)
                generation += 1
            time.sleep(_POLL_SECONDS)
        raise MembershipError(f"{self._name} was not let in within {timeout:g} s, up to generation {generation - 1}")

    def waiting(self, members: Members) -> tuple[str, ...]:
        """Who has asked to join, is not in and has been seen to beat."""
        joins = self._store.add("joins", 0)
        self._unread |= set(range(self._joins_seen + 1, joins + 1))
        self._joins_seen = joins
        for ordinal in sorted(self._unread):
            if self._store.check([f"join/{ordinal}"]):  # else it is about to be written, or its writer has died
                self._asked.append(self._text(f"join/{ordinal}"))
                self._unread.discard(ordinal)
        asked = [name for name in self._asked if name not in members.names]
        self._asked = [name for name in asked if not self._watch.is_silent(name)]
        return tuple(name for name in self._asked if self._watch.has_beaten(name))

    def agree(
        self, before: Members, suspects: Collection[str], joining: Sequence[str], leaving: Collection[str]
    ) -> Members:
        """Tell that this process is here, and wait for the next list, or write it once nobody is waited for."""
        generation, start = before.generation + 1, time.monotonic()
        expected = [name for name in before.names if name not in leaving]
        newcomers = [name for name in dict.fromkeys(joining) if name not in before.names]
        self._store.set(_begun(generation), "1")
        self._store.set(_here(generation, self._name), "1")
        while not self._store.check([_list(generation)]):
            present = self._present(generation, expected, suspects, time.monotonic() - start)
            if present is None:
                time.sleep(_POLL_SECONDS)
            else:
                self._propose(generation, present + [name for name in newcomers if not self._watch.is_silent(name)])
        return self._decided(generation)

    def check(self, members: Members) -> None:
        """Raise `MembersLost` if the generation no longer holds."""
        if self._store.check([_begun(members.generation + 1)]):
            raise MembersLost(f"others have begun generation {members.generation + 1}")
        silent = tuple(name for name in members.names if name != self._name and self._watch.is_silent(name))
        if silent:
            raise MembersLost(f"{listing(silent)} showed no sign of life for {self._silence:g} s", silent)

    def meet(self, members: Members, what: str, timeout: float) -> None:
        """Wait until all members have come to a point."""
        deadline = time.monotonic() + timeout
        key_of = {name: f"{members.generation}/met/{what}/{name}" for name in members.names}
        self._store.set(key_of[self._name], "1")
        while not self._store.check(list(key_of.values())):
            self.check(members)
            if time.monotonic() > deadline:
                late = tuple(name for name, key in key_of.items() if not self._store.check([key]))
                raise MembersLost(f"{listing(late)} did not come to {what!r} within {timeout:g} s", late)
            time.sleep(_POLL_SECONDS)

    def latest(self) -> tuple[str, ...]:
        """The names in the last list; none before the first."""
        names, generation = (), 0
        while self._store.check([_list(generation)]):
            names, generation = tuple(name for name, _ in self._read(generation)), generation + 1
        return names

    def _present(
        self, generation: int, expected: list[str], suspects: Collection[str], waited: float
    ) -> list[str] | None:
        """Who has come, or None while others may still come."""
        if self._store.check([_here(generation, name) for name in expected]):
            return expected
        absent = [name for name in expected if not self._store.check([_here(generation, name)])]
        alive = [name for name in absent if not self._watch.is_silent(name)]
        if any(waited < (self._silence if name in suspects else self._timeout) for name in alive):
            return None
        present = [name for name in expected if name not in absent]
        living = [name for name in expected if name in present or name in alive]
        if 2 * len(present) < len(living) or (2 * len(present) == len(living) and living[0] not in present):
            self._store.delete_key(_here(generation, self._name))  # who gives up must not be counted in
            raise MembershipError(
                f"{len(present)} of {len(living)} living members came to end generation {generation - 1} in "
                f"{waited:.1f} s; not {listing(alive)}. Too few to go on without the others."
            )
        return present

    def _propose(self, generation: int, names: list[str]) -> None:
        """Write the list, unless another one was faster."""
        nodes = {name: self._text(f"node/{name}") for name in names}
        by_node = [name for node in dict.fromkeys(nodes.values()) for name in names if nodes[name] == node]
        self._store.compare_set(_list(generation), "", json.dumps([(name, nodes[name]) for name in by_node]))

    def _decided(self, generation: int) -> Members:
        pairs = self._read(generation)
        names, nodes = tuple(name for name, _ in pairs), tuple(node for _, node in pairs)
        if self._name in names:
            return Members(generation, names, nodes, names.index(self._name))
        if generation == 0:
            raise MembershipError(f"the store holds another group, {listing(names)}. Use a PrefixStore of your own.")
        raise Evicted(f"{self._name} is not in generation {generation}: {listing(names)}")

    def _read(self, generation: int) -> list[tuple[str, str]]:
        return [(name, node) for name, node in json.loads(self._text(_list(generation)))]

    def _text(self, key: str) -> str:
        return self._store.get(key).decode()


def _begun(generation: int) -> str:
    return f"{generation}/begun"


def _here(generation: int, name: str) -> str:
    return f"{generation}/here/{name}"


def _list(generation: int) -> str:
    return f"{generation}/list"
