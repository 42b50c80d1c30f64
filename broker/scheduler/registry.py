"""Who is registered, and whether it may get requests. Decides; the table is written through `Table`, sockets are
the shell's. Time is passed in.

    HTTP engines    probed by the shell: `health-failure-threshold` failures in a row make one DOWN,
                    `health-success-threshold` successes READY again; in doubt it is asked more often
    native engines  beat: silence for `wire.DEAD_AFTER_S` makes one DOWN, the next beat READY again. One that never
                    beats (registered by somebody else) is probed, and an answer counts as a sign of life
    FastDeploy      one that says it is paused, in its registrations, gets nothing new while another of its kind serves.
                    When all are paused requests go there as ever, and wait inside until they are resumed
    both            forgotten after `expire-after-secs` without a sign of life; DRAINING is an operator's word and
                    stays, healthy or not, until `resume`

An engine's life is its incarnation. Another one at the same endpoint is another instance: new slot, new generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from broker import wire
from broker.config import Config
from broker.errors import PenstockError
from broker.faces import face_of
from broker.scheduler.fields import MOST_CAPACITY, from_hello
from broker.table import State
from broker.types import Instance, LoadReport, Role

SECOND_NS = 1_000_000_000
DEAD_AFTER_NS = int(wire.DEAD_AFTER_S * SECOND_NS)
GRACE_NS = 2 * DEAD_AFTER_NS
"""What native engines get to be heard after the scheduler itself was away: killed, or stopped for a while."""
LATE_NS = SECOND_NS
"""A tick later than this after the last one means that the scheduler was stopped: silence proves nothing."""
IN_DOUBT = 5
"""An instance between READY and DOWN is probed this many times as often."""
REMEMBERED = 4096
"""Ended incarnations that are told from unknown ones; the oldest is forgotten first."""


class Table(Protocol):
    """What the registry needs of `broker.table_writer.TableWriter`."""

    @property
    def epoch(self) -> int: ...
    def take_over(self) -> list[tuple[int, Instance, State]]: ...
    def admit(self, instance: Instance, now_ns: int) -> int: ...
    def describe(self, slot: int, instance: Instance) -> None: ...
    def set_state(self, slot: int, state: State) -> None: ...
    def report(self, slot: int, report: LoadReport, now_ns: int) -> None: ...
    def remove(self, slot: int, now_ns: int) -> None: ...


@dataclass(slots=True)
class Member:
    """A registered instance. Owned by the registry; others look."""

    slot: int
    instance: Instance
    alive_ns: int
    """Last sign of life: a beat, a good probe, a registration."""
    draining: bool = False
    rests: bool = False
    """It is paused, and others serve."""
    healthy: bool = True
    ready: bool = True
    """Native: its own word, in its beats."""
    failures: int = 0
    successes: int = 0
    beat_ns: int | None = None
    """Native: when it was last heard itself."""
    quiet_until_ns: int = 0
    """Native: silence up to here is forgiven."""
    probe_ns: int = 0
    """When the next health check is due."""
    checks: int = 0
    """Health checks so far; the watch counts them."""
    poll_ns: int = 0
    """When `/metrics` is due."""

    @property
    def is_paused(self) -> bool:
        fields = self.instance.fastdeploy
        return fields is not None and fields.is_paused

    @property
    def state(self) -> State:
        if self.draining or (self.rests and self.healthy):
            return State.DRAINING
        return State.READY if self.healthy else State.DOWN


class Registry:
    """The members, by URL. The only writer of the table's membership and load."""

    def __init__(self, table: Table, config: Config, now_ns: int) -> None:
        """Takes the table over: every survivor is a member again, as it was."""
        self._table = table
        self._splitwise = config.server.splitwise
        # Where a check is several probes at once, the first one that fails has the last word.
        self._failures = 1 if face_of(config).probes_at_once else config.manager.health_failure_threshold
        self._successes = config.manager.health_success_threshold
        self._probe_ns = int(config.manager.health_check_interval_secs * SECOND_NS)
        self._covered_ns = 2 * (self._probe_ns + int(config.manager.health_check_timeout_secs * SECOND_NS))
        """How long one good probe speaks for a native engine that does not beat."""
        self._expire_ns = int(config.manager.expire_after_secs * SECOND_NS)
        self._ticked_ns = now_ns
        self._members: dict[str, Member] = {}
        self._native: dict[bytes, Member] = {}
        self._ended: dict[bytes, bool] = {}  # incarnation -> whether it may say hello again
        self.changes = 0
        """Rises with every change of who is registered and how; lets the shell reconcile what hangs on it."""
        survivors = table.take_over()
        for index, (slot, instance, state) in enumerate(survivors):
            member = Member(
                slot=slot,
                instance=instance,
                draining=state is State.DRAINING,
                healthy=state is not State.DOWN,
                alive_ns=now_ns,
                quiet_until_ns=now_ns + GRACE_NS,
                probe_ns=now_ns + self._probe_ns * index // len(survivors),  # spread, not all at once
            )
            if member.is_paused:  # then it rested: the table does not tell that from an operator's word
                member.rests, member.draining = member.draining, False
            self._enter(member)
        self._settle_paused()

    def __repr__(self) -> str:
        members = ", ".join(f"{m.instance.url}={m.state.name}@{m.slot}" for m in self._members.values())
        return f"Registry(epoch={self._table.epoch}, {members})"

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, url: str) -> Member | None:
        return self._members.get(url)

    # -- coming and going --------------------------------------------------------------------------------------

    def register(self, instance: Instance, now_ns: int) -> Member:
        """A probed instance joins, or joins again; every frontend sees it when this returns.

        Nothing is written when nothing changed: engines repeat their registration for ever.
        Raises TableFull, MetadataTooLarge.
        """
        member = self._members.get(instance.url)
        if member is not None and member.instance.incarnation != instance.incarnation:
            self._remove(member, now_ns, may_return=False)
            member = None
        if member is None:
            member = self._admit(instance, now_ns)
        elif member.instance != instance:
            self._table.describe(member.slot, instance)
            member.instance = instance
            self.changes += 1
        member.alive_ns = now_ns
        member.quiet_until_ns = now_ns + self._covered_ns
        self._set_healthy(member, member.ready)
        self._settle_paused()
        return member

    def leave(self, url: str, now_ns: int) -> bool:
        """It is no more: nothing new goes there, what it has goes on. False = it was not registered."""
        member = self._members.get(url)
        if member is None:
            return False
        self._remove(member, now_ns, may_return=True)
        return True

    def drain(self, url: str, resume: bool) -> Member | None:
        """No new requests to it, or (resume) again; None = not registered. `url` may be as a person writes it."""
        member = self._members.get(url) or self._members.get(url.rstrip("/").lower())
        if member is not None and member.draining is resume:
            member.draining = not resume
            self._table.set_state(member.slot, member.state)
            self.changes += 1
            self._settle_paused()
        return member

    # -- native engines ----------------------------------------------------------------------------------------

    def hello(self, hello: wire.EngineHello, now_ns: int) -> wire.Accepted | wire.Refused:
        """A native engine registers; idempotent per incarnation."""
        if hello.protocol != wire.PROTOCOL:
            return wire.Refused(f"this scheduler speaks protocol {wire.PROTOCOL}, not {hello.protocol}")
        if self._ended.get(hello.incarnation) is False:
            return wire.Refused("another incarnation has taken this one's place")
        try:
            instance = from_hello(hello, self._splitwise)
            moved = self._native.get(instance.incarnation)
            if moved is not None and moved.instance.url != instance.url:
                self._remove(moved, now_ns, may_return=True)
            member = self.register(instance, now_ns)
        except PenstockError as e:
            return wire.Refused(e.message)
        member.beat_ns = now_ns
        member.quiet_until_ns = 0
        self._ended.pop(instance.incarnation, None)
        return wire.Accepted(wire.PROTOCOL, self._table.epoch)

    def beat(self, beat: wire.EngineBeat, now_ns: int) -> wire.SchedulerBeat | wire.HelloAgain:
        """A sign of life; one from an unknown incarnation asks it to register."""
        member = self._native.get(beat.incarnation)
        if member is None:
            if beat.incarnation in self._ended:  # it said goodbye, or was replaced: nothing to ask of it
                return wire.SchedulerBeat(self._table.epoch)
            return wire.HelloAgain()
        member.alive_ns = member.beat_ns = now_ns
        member.quiet_until_ns = 0
        member.ready = beat.ready
        if 0 <= beat.capacity <= MOST_CAPACITY and beat.capacity != member.instance.capacity:
            member.instance = msgspec.structs.replace(member.instance, capacity=beat.capacity)
            self._table.describe(member.slot, member.instance)
        self._set_healthy(member, beat.ready)
        return wire.SchedulerBeat(self._table.epoch)

    def goodbye(self, incarnation: bytes, now_ns: int) -> bool:
        """It leaves: nothing new goes there, what it has goes on. False = it was not registered."""
        member = self._native.get(incarnation)
        if member is None:
            return False
        self._remove(member, now_ns, may_return=True)
        return True

    # -- health ------------------------------------------------------------------------------------------------

    def due(self, now_ns: int) -> list[Member]:
        """Whose health must be checked now; each is due again when `probed` says so, or after an interval."""
        members = []
        for member in self._members.values():
            if member.probe_ns > now_ns:
                continue
            member.probe_ns = now_ns + self._probe_ns
            if not member.instance.is_native or member.beat_ns is None or now_ns - member.beat_ns > DEAD_AFTER_NS:
                members.append(member)
        return members

    def probed(self, member: Member, ok: bool, now_ns: int) -> bool:
        """The outcome of one health check. True when it changed the member's health."""
        if self._members.get(member.instance.url) is not member:
            return False  # it left while it was being asked
        was = member.healthy
        if ok:
            member.alive_ns = now_ns
            member.quiet_until_ns = now_ns + self._covered_ns
            member.failures, member.successes = 0, member.successes + 1
            if member.successes >= self._successes:
                self._set_healthy(member, member.ready)
        else:
            member.failures, member.successes = member.failures + 1, 0
            if member.failures >= self._failures and not member.instance.is_native:
                self._set_healthy(member, False)
        if not member.healthy and self._expire_ns == 0:
            self._remove(member, now_ns, may_return=True)
        elif ok is not member.healthy:
            member.probe_ns = now_ns + self._probe_ns // IN_DOUBT
        return member.healthy is not was

    def tick(self, now_ns: int) -> list[Member]:
        """Time passes; called every `table.BEAT_S`. Returns who fell silent or was forgotten."""
        if now_ns - self._ticked_ns > LATE_NS:
            for member in self._native.values():
                member.quiet_until_ns = now_ns + GRACE_NS
        self._ticked_ns = now_ns
        gone = []
        for member in self:
            silent_ns = now_ns - member.alive_ns
            if not member.healthy and silent_ns > self._expire_ns:
                self._remove(member, now_ns, may_return=True)
                gone.append(member)
            elif (
                member.instance.is_native
                and member.healthy
                and silent_ns > DEAD_AFTER_NS
                and now_ns > member.quiet_until_ns
            ):
                self._set_healthy(member, False)
                gone.append(member)
        return gone

    # -- load --------------------------------------------------------------------------------------------------

    def load(self, url: str, report: LoadReport, now_ns: int) -> bool:
        """What an instance said of itself; False = it is no member, and nothing was written."""
        member = self._members.get(url)
        if member is None:
            return False
        self._table.report(member.slot, report, now_ns)
        return True

    def native_load(self, incarnation: bytes, report: LoadReport, now_ns: int) -> bool:
        """The same by incarnation: a dead one's last words are dropped."""
        member = self._native.get(incarnation)
        if member is None:
            return False
        self._table.report(member.slot, report, now_ns)
        return True

    # -- one place each ----------------------------------------------------------------------------------------

    def _admit(self, instance: Instance, now_ns: int) -> Member:
        member = Member(
            slot=self._table.admit(instance, now_ns),
            instance=instance,
            alive_ns=now_ns,
            probe_ns=now_ns + self._probe_ns,
        )
        self._enter(member)
        return member

    def _enter(self, member: Member) -> None:
        self._members[member.instance.url] = member
        if member.instance.is_native:
            self._native[member.instance.incarnation] = member
        self.changes += 1

    def _set_healthy(self, member: Member, healthy: bool) -> None:
        if healthy:
            member.failures = 0
        if member.healthy is healthy:
            return
        member.healthy = healthy
        member.successes = 0
        if not member.draining:
            self._table.set_state(member.slot, member.state)
        self.changes += 1
        self._settle_paused()

    def _remove(self, member: Member, now_ns: int, *, may_return: bool) -> None:
        self._table.remove(member.slot, now_ns)
        del self._members[member.instance.url]
        if member.instance.is_native:
            del self._native[member.instance.incarnation]
            self._ended[member.instance.incarnation] = may_return
            for oldest in list(self._ended)[: len(self._ended) - REMEMBERED]:
                del self._ended[oldest]
        self.changes += 1
        self._settle_paused()

    def _settle_paused(self) -> None:
        """Who is paused rests, as long as somebody else of the same role and models serves. Called after any change."""
        paused = [member for member in self._members.values() if member.is_paused or member.rests]
        if not paused:
            return
        serving = {
            _kind(member)
            for member in self._members.values()
            if member.healthy and not member.draining and not member.is_paused
        }
        for member in paused:
            was = member.state
            member.rests = member.is_paused and _kind(member) in serving
            if member.state is not was:
                self._table.set_state(member.slot, member.state)
                self.changes += 1


def _kind(member: Member) -> tuple[Role, tuple[str, ...]]:
    return member.instance.role, member.instance.models
