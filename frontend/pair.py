"""Which prefill and which decode instance share a request: chosen together, two leases at once.

What a pair then does with the request is `frontend.paircall`'s; retries, counters and the log line are
`frontend.forward`'s, as for a single instance. `suspects` tells it who failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from random import Random, SystemRandom
from typing import NamedTuple, Protocol

from broker.config import Config
from broker.engines.pd import PAIRINGS, Pairing, connector_of, fits_together, pairings, traits
from broker.errors import NoInstance, PenstockError
from broker.faces import face_of
from broker.lease import Lease
from broker.route import RouteRequest
from broker.types import Connector, Role
from frontend.admission import Admission
from frontend.dispatch import TAKES, Choice, Chooser, Chosen, Dispatcher
from frontend.paircall import PairCall
from frontend.pairline import LegLine, NoRoom
from frontend.partners import Fleet, Partners
from frontend.upstream.base import Call, Sink, UpstreamRequest, Upstreams
from frontend.waiting import Saturated


class Terms(NamedTuple):
    """What holds for every request at a pair. Times in seconds; 0 = no limit, or no waiting."""

    prefill_s: float = 0.0
    """From the sending until prefill is done."""
    decode_s: float = 0.0
    """From then until decode's first byte."""
    whole_s: float = 0.0
    """From the sending until the answer's end."""
    awaits_prefill_s: float = 0.0
    """From the sending, how long decode's answer waits for prefill's status when both were asked at once."""
    repeats: bool = True
    """The pair that failed is tried again where there is no other."""

    @classmethod
    def of(cls, config: Config) -> Terms:
        face, timeouts = face_of(config), config.timeouts
        return cls(
            prefill_s=timeouts.prefill_secs,
            decode_s=timeouts.decode_secs,
            whole_s=timeouts.pair_secs,
            awaits_prefill_s=face.awaits_prefill_s,
            repeats=face.repeats_pairs,
        )


class Legs(Protocol):
    """Who chooses single instances: a `Dispatcher`, or an `Admission` that looks whether they have room."""

    def choose(
        self, request: RouteRequest, tried: Collection[int], now: float, unfit: Collection[int] = ()
    ) -> Choice: ...


class Pairer(Chooser):
    """Chooses prefill and decode, in this order. Owned by the frontend's process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        partners: Partners,
        pairings: Mapping[Connector, Pairing],
        rng: Random,
        loop: asyncio.AbstractEventLoop,
        terms: Terms | None = None,
        line: Admission | None = None,
    ) -> None:
        """`line`: where requests stand that find no room; without one, they wait in the engines."""
        super().__init__(dispatcher.breaker)
        self.rng = rng
        self.loop = loop
        self.terms = terms or Terms()
        self._dispatcher = dispatcher
        self._legs: Legs = line or dispatcher
        self._admission = line
        self._lines = {role: LegLine(self, role) for role in (Role.PREFILL, Role.DECODE)}
        self._partners = partners
        self._pairings = pairings

    @classmethod
    def over(
        cls,
        fleet: Fleet,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        line: Admission | None = None,
    ) -> Pairer:
        """As a frontend needs it. Rooms and ids come from the system: another frontend must not draw the same."""
        found = PAIRINGS if face_of(config).compares_sizes else pairings(any_tp=True)
        return cls(dispatcher, Partners(fleet, found), found, SystemRandom(), loop, Terms.of(config), line)

    def choose(self, request: RouteRequest, tried: Collection[int], now: float) -> PairChoice:
        """Two leases at once, or none. Raises as `Dispatcher.choose`; `Saturated` where there is a line."""
        return self._choose(self._legs, request, tried, now)

    def _choose(self, legs: Legs, request: RouteRequest, tried: Collection[int], now: float) -> PairChoice:
        for _ in range(TAKES):
            # Every time anew: what was found not to fit may have been another membership.
            lonely = self._partners.lonely()
            try:
                prefill = legs.choose(_prefill(request), tried, now, lonely)
            except Saturated as full:
                raise NoRoom(self._lines[Role.PREFILL], full) from None
            try:
                unfit = self._partners.unfit(prefill.lease.slot)
                decode = legs.choose(_decode(request), tried, now, unfit)
            except Saturated as full:
                self._give_back(prefill)
                raise NoRoom(self._lines[Role.DECODE], full) from None
            except BaseException:
                self._give_back(prefill)
                raise
            if not self.terms.repeats and not {prefill.lease.slot, decode.lease.slot}.isdisjoint(tried):
                reason = "there is no other pair"
            elif not fits_together(traits(prefill.instance), traits(decode.instance), self._pairings):
                reason = ""
            else:
                return self._pair(prefill, decode, len(tried))
            self._give_back(prefill)
            self._give_back(decode)
            if reason:
                raise NoInstance(reason)
        raise NoInstance("instances come and go faster than a pair can be found; try again")

    # -- of those in line --------------------------------------------------------------------------------------

    @property
    def line(self) -> Admission:
        """Of single legs."""
        assert self._admission is not None, "nobody waits where there is no line"
        return self._admission

    def asked(self, request: RouteRequest, role: Role) -> RouteRequest:
        return _prefill(request) if role is Role.PREFILL else _decode(request)

    def complete(self, request: RouteRequest, leg: Choice, now: float, *, full: bool) -> PairChoice:
        """The pair of a leg that was granted; without room for its partner, or a partner, the leg is given back."""
        self._partners.lonely()
        other = Role.DECODE if leg.instance.role is Role.PREFILL else Role.PREFILL
        find = self._partners.unfit if other is Role.DECODE else self._partners.strangers
        unfit = find(leg.lease.slot)
        try:
            partner = self.line.complete(self.asked(request, other), now, unfit, full=full)
        except Saturated as saturated:
            self._give_back(leg)
            raise NoRoom(self._lines[other], saturated) from None
        except NoInstance:  # nobody fits it: another leg may do
            self._give_back(leg)
            return self._choose(self._dispatcher if full else self._legs, request, (), now)
        except BaseException:
            self._give_back(leg)
            raise
        prefill, decode = (leg, partner) if other is Role.DECODE else (partner, leg)
        if fits_together(traits(prefill.instance), traits(decode.instance), self._pairings):
            return self._pair(prefill, decode, 0)
        self._give_back(prefill)
        self._give_back(decode)
        return self._choose(self._dispatcher if full else self._legs, request, (), now)

    def _pair(self, prefill: Choice, decode: Choice, given_up: int) -> PairChoice:
        return PairChoice(self, self._pairings[connector_of(prefill.instance)], prefill, decode, given_up)

    def _give_back(self, leg: Choice) -> None:
        if self._admission is not None:
            self._admission.give_back(leg)
        else:
            leg.lease.withdraw()

    def placed(self, request: RouteRequest, chosen: Chosen) -> None:
        for asked, leg in zip((_prefill(request), _decode(request)), chosen.legs, strict=True):
            self._dispatcher.placed(asked, leg)


def _prefill(request: RouteRequest) -> RouteRequest:
    return request.leg(Role.PREFILL, request.prompt_tokens)


def _decode(request: RouteRequest) -> RouteRequest:
    """The prompt's tokens are prefill's work; decode's load is its requests."""
    return request.leg(Role.DECODE, 0)


class PairChoice(Chosen):
    """A pair, and the two leases that count the request there."""

    __slots__ = ("_suspects", "decode", "given_up", "pairer", "pairing", "prefill")

    def __init__(self, pairer: Pairer, pairing: Pairing, prefill: Choice, decode: Choice, given_up: int = 0) -> None:
        """`given_up`: how many instances were, in earlier attempts."""
        super().__init__(decode.instance, decode.lease)
        self.pairer = pairer
        self.pairing = pairing
        self.prefill = prefill
        self.decode = decode
        self.given_up = given_up
        self._suspects: tuple[Lease, ...] = (prefill.lease,) if pairing.sequential else (decode.lease, prefill.lease)

    def __repr__(self) -> str:
        return f"PairChoice({self.where})"

    @property
    def suspects(self) -> tuple[Lease, ...]:
        return self._suspects

    @suspects.setter
    def suspects(self, leases: tuple[Lease, ...]) -> None:
        """The call keeps this true."""
        self._suspects = leases

    @property
    def retried(self) -> Collection[int]:
        return self.pairing.retried

    @property
    def where(self) -> str:
        return f"{self.prefill.instance.url},{self.decode.instance.url}"

    @property
    def legs(self) -> tuple[Choice, ...]:
        return self.prefill, self.decode

    def prefilled(self) -> None:
        """Prefill has done its work. Idempotent."""
        lease = self.prefill.lease
        if not lease.closed:
            lease.close()
            self.pairer.breaker.succeeded(lease.slot)
            self.suspects = (self.lease,)

    def open(self, upstreams: Upstreams, request: UpstreamRequest, sink: Sink) -> Call:
        call = PairCall(self, upstreams, request, sink)
        try:
            call.begin()
        except PenstockError as error:
            self.pairer.loop.call_soon(call.give_up, error)
        return call
