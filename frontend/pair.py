"""Which prefill and which decode instance share a request: chosen together, two leases at once.

What a pair then does with the request is `frontend.paircall`'s; retries, counters and the log line are
`frontend.forward`'s, as for a single instance. `suspects` tells it who failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from random import Random, SystemRandom
from typing import NamedTuple

import msgspec

from broker.config import Config
from broker.engines.pd import PAIRINGS, Pairing, connector_of, fits_together, pairings, traits
from broker.errors import NoInstance, PenstockError
from broker.faces import face_of
from broker.lease import Lease
from broker.types import Connector, Instance, Role, RouteRequest
from frontend.dispatch import TAKES, Choice, Chosen, Dispatcher
from frontend.paircall import PairCall
from frontend.partners import Fleet, Partners
from frontend.upstream.base import Call, Sink, Upstream, UpstreamRequest


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


class Pairer:
    """Chooses prefill and decode, in this order. Owned by the frontend's process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        partners: Partners,
        pairings: Mapping[Connector, Pairing],
        rng: Random,
        loop: asyncio.AbstractEventLoop,
        terms: Terms | None = None,
    ) -> None:
        self.breaker = dispatcher.breaker
        self.rng = rng
        self.loop = loop
        self.terms = terms or Terms()
        self._dispatcher = dispatcher
        self._partners = partners
        self._pairings = pairings

    @classmethod
    def over(cls, fleet: Fleet, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop, config: Config) -> Pairer:
        """As a frontend needs it. Rooms and ids come from the system: another frontend must not draw the same."""
        found = PAIRINGS if face_of(config).compares_sizes else pairings(any_tp=True)
        return cls(dispatcher, Partners(fleet, found), found, SystemRandom(), loop, Terms.of(config))

    def choose(self, request: RouteRequest, tried: Collection[int], now: float) -> PairChoice:
        """Two leases at once, or none. Raises as `Dispatcher.choose`."""
        for _ in range(TAKES):
            # Every time anew: what was found not to fit may have been another membership.
            lonely = self._partners.lonely()
            prefill = self._dispatcher.choose(_prefill(request), tried, now, lonely)
            try:
                unfit = self._partners.unfit(prefill.lease.slot)
                decode = self._dispatcher.choose(_decode(request), tried, now, unfit)
            except BaseException:
                prefill.lease.close()
                raise
            if not self.terms.repeats and not {prefill.lease.slot, decode.lease.slot}.isdisjoint(tried):
                reason = "there is no other pair"
            elif not fits_together(traits(prefill.instance), traits(decode.instance), self._pairings):
                reason = ""
            else:
                pairing = self._pairings[connector_of(prefill.instance)]
                return PairChoice(self, pairing, prefill, decode, len(tried))
            prefill.lease.withdraw()
            decode.lease.withdraw()
            if reason:
                raise NoInstance(reason)
        raise NoInstance("instances come and go faster than a pair can be found; try again")

    def placed(self, request: RouteRequest, chosen: Chosen) -> None:
        for asked, leg in zip((_prefill(request), _decode(request)), chosen.legs, strict=True):
            self._dispatcher.placed(asked, leg)


def _prefill(request: RouteRequest) -> RouteRequest:
    return msgspec.structs.replace(request, role=Role.PREFILL)


def _decode(request: RouteRequest) -> RouteRequest:
    """The prompt's tokens are prefill's work; decode's load is its requests."""
    return msgspec.structs.replace(request, role=Role.DECODE, prompt_tokens=0)


class PairChoice:
    """A pair, and the two leases that count the request there."""

    __slots__ = ("decode", "given_up", "pairer", "pairing", "prefill", "suspects")

    def __init__(self, pairer: Pairer, pairing: Pairing, prefill: Choice, decode: Choice, given_up: int = 0) -> None:
        """`given_up`: how many instances were, in earlier attempts."""
        self.pairer = pairer
        self.pairing = pairing
        self.prefill = prefill
        self.decode = decode
        self.given_up = given_up
        self.suspects: tuple[Lease, ...] = (prefill.lease,) if pairing.sequential else (decode.lease, prefill.lease)
        """Who is to blame if the attempt ends now; its call keeps this true."""

    def __repr__(self) -> str:
        return f"PairChoice({self.where})"

    @property
    def instance(self) -> Instance:
        return self.decode.instance

    @property
    def lease(self) -> Lease:
        return self.decode.lease

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

    def open(self, upstream: Callable[[Instance], Upstream], request: UpstreamRequest, sink: Sink) -> Call:
        call = PairCall(self, upstream, request, sink)
        try:
            call.begin()
        except PenstockError as error:
            self.pairer.loop.call_soon(call.give_up, error)
        return call
