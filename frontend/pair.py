"""One request at two instances, as one choice and one call: whoever forwards sees a transport like any other.

    concurrent     both legs are opened at once
    sequential     PREFILL --[its whole answer]--> decode is opened

                         decode's first byte
      PREFILL --> BOTH ----------------------> ANSWERING --[finish, fail]--> ENDED
         |          |                                                          ^
         |          +--[either leg fails, decode refuses: the other is cancelled]
         +----------+--[prefill refuses]--> REFUSED (its answer is the client's) --[finish, fail]--+

* Whatever ends one leg ends the other, in the same turn of the loop. Only once decode has said a byte of its answer
  is prefill's fate of no more concern: decode says nothing before it has the cache.
* Prefill's answer is never waited for when decode answers (FastDeploy's may never come), and is cut off when decode has
  ended.
* Prefill's lease is closed here: when prefill is done (the first chunk of a stream, the end of another answer, decode's
  first byte at the latest), or with the call. Decode's belongs to whoever forwards.

Retries, timers, counters and the log line are `frontend.forward`'s, as for a single instance; `suspects` tells it who
failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from random import Random, SystemRandom

import msgspec

from broker.engines.pd import PAIRINGS, Asked, Leg, Pairing, connector_of, fits_together, traits
from broker.errors import NoInstance, PenstockError, UpstreamBroken
from broker.lease import Lease
from broker.types import Connector, Instance, Role, RouteRequest
from frontend.breaker import Breaker
from frontend.dispatch import TAKES, Choice, Chosen, Dispatcher
from frontend.partners import Fleet, Partners
from frontend.upstream.base import Call, Headers, Sink, Upstream, UpstreamRequest

PREFILL_URL, DECODE_URL = b"X-Router-Prefill-Url", b"X-Router-Decode-Url"
"""In the spelling that FastDeploy's router has on the wire."""

MAX_PREFILL_ANSWER = 16 * 1024 * 1024
"""What a sequential prefill may answer: one token, and the ids of its blocks."""


class Pairer:
    """Chooses prefill and decode, in this order. Owned by the frontend's process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        partners: Partners,
        pairings: Mapping[Connector, Pairing],
        rng: Random,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.breaker = dispatcher.breaker
        self._dispatcher = dispatcher
        self._partners = partners
        self._pairings = pairings
        self._rng = rng
        self._loop = loop

    @classmethod
    def over(
        cls,
        fleet: Fleet,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        pairings: Mapping[Connector, Pairing] = PAIRINGS,
    ) -> Pairer:
        """As a frontend needs it. Rooms and ids come from the system: another frontend must not draw the same."""
        return cls(dispatcher, Partners(fleet, pairings), pairings, SystemRandom(), loop)

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
            if fits_together(traits(prefill.instance), traits(decode.instance), self._pairings):
                pairing = self._pairings[connector_of(prefill.instance)]
                return PairChoice(pairing, prefill, decode, self.breaker, self._rng, self._loop)
            prefill.lease.close()
            decode.lease.close()
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

    __slots__ = ("_breaker", "_loop", "_rng", "decode", "pairing", "prefill", "suspects")

    def __init__(
        self,
        pairing: Pairing,
        prefill: Choice,
        decode: Choice,
        breaker: Breaker,
        rng: Random,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.pairing = pairing
        self.prefill = prefill
        self.decode = decode
        self.suspects: tuple[Lease, ...] = (prefill.lease,) if pairing.sequential else (decode.lease, prefill.lease)
        """Who is to blame if the attempt ends now; its call keeps this true."""
        self._breaker = breaker
        self._rng = rng
        self._loop = loop

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
            self._breaker.succeeded(lease.slot)
            self.suspects = (self.lease,)

    def open(self, upstream: Callable[[Instance], Upstream], request: UpstreamRequest, sink: Sink) -> Call:
        call = PairCall(self, upstream, request, sink)
        try:
            call.begin(self._rng)
        except PenstockError as error:
            self._loop.call_soon(call.give_up, error)
        return call


class State(Enum):
    PREFILL = 0
    BOTH = 1
    ANSWERING = 2
    REFUSED = 3
    ENDED = 4


class PairCall:
    """One attempt at one pair; `Call` for whoever forwards. Owns both legs' calls and prefill's lease."""

    __slots__ = (
        "_answer",
        "_answered",
        "_choice",
        "_decode_call",
        "_make_decode",
        "_names",
        "_paused",
        "_prefill_call",
        "_request",
        "_sink",
        "_state",
        "_upstream",
    )

    def __init__(
        self,
        choice: PairChoice,
        upstream: Callable[[Instance], Upstream],
        request: UpstreamRequest,
        sink: Sink,
    ) -> None:
        self._choice = choice
        self._upstream = upstream
        self._request = request
        self._sink = sink
        self._state = State.PREFILL if choice.pairing.sequential else State.BOTH
        self._prefill_call: Call | None = None
        self._decode_call: Call | None = None
        self._make_decode: Callable[[bytes], Leg]
        self._answer: list[bytes] = []
        self._answered = 0
        self._paused = False
        self._names = [
            (PREFILL_URL, choice.prefill.instance.url.encode()),
            (DECODE_URL, choice.decode.instance.url.encode()),
        ]

    def __repr__(self) -> str:
        return f"<PairCall {self._state.name} {self._choice.where}>"

    def begin(self, rng: Random) -> None:
        """Opens the first leg, or both. Raises what the request or the pair cannot do; then nothing was opened."""
        choice, request = self._choice, self._request
        asked = Asked(body=request.body, request_id=request.request_id)
        plan = choice.pairing.plan(asked, choice.prefill.instance, choice.decode.instance, rng)
        self._make_decode = plan.decode
        self._prefill_call = self._open(choice.prefill.instance, plan.prefill, PrefillLeg(self))
        if not choice.pairing.sequential:
            self._open_decode(plan.decode(b""))

    # -- whoever forwards ----------------------------------------------------------------------------------

    def cancel(self) -> None:
        if self._state is not State.ENDED:
            self._end()

    def pause(self) -> None:
        """Prefill's answer is for nobody and is read all the same, unless it is the client's."""
        self._paused = True
        if (call := self._answering_call()) is not None:
            call.pause()

    def resume(self) -> None:
        self._paused = False
        if (call := self._answering_call()) is not None:
            call.resume()

    def give_up(self, error: PenstockError) -> None:
        """Ends the attempt with an error; whoever forwards may try another pair from within, so what is held here is
        let go afterwards: the policy sees those who failed as no emptier than they were."""
        if self._state is State.ENDED:
            return
        self._cancel_calls()
        self._state = State.ENDED
        error.headers, error.request_id = tuple(self._names), self._request.request_id
        self._sink.fail(error)
        self._choice.prefill.lease.close()

    # -- prefill's leg -------------------------------------------------------------------------------------

    def prefill_starts(self, status: int, headers: Headers) -> None:
        if 200 <= status < 300 or self._state in (State.ANSWERING, State.ENDED):
            return
        # Without its cache decode would wait for ever, so the refusal is the answer, whatever the dialect says of it.
        self._state = State.REFUSED
        self._choice.suspects = (self._choice.prefill.lease,)
        self._cancel_decode()
        if self._paused and self._prefill_call is not None:
            self._prefill_call.pause()
        self._sink.start(status, headers + self._names)

    def prefill_writes(self, data: bytes) -> None:
        if self._state is State.REFUSED:
            self._sink.write(data)
        elif self._state is State.PREFILL:
            self._answer.append(data)
            self._answered += len(data)
            if self._answered > MAX_PREFILL_ANSWER:
                self.give_up(UpstreamBroken(f"prefill answered more than {MAX_PREFILL_ANSWER} bytes"))
        elif self._request.stream:
            self._choice.prefilled()

    def prefill_finishes(self) -> None:
        self._prefill_call = None
        if self._state is State.REFUSED:
            self._end()
            self._sink.finish()
        elif self._state is State.PREFILL:
            try:
                leg = self._make_decode(b"".join(self._answer))
            except PenstockError as error:
                self.give_up(error)
                return
            self._answer.clear()
            self._state = State.BOTH
            self._choice.prefilled()
            self._open_decode(leg)
        else:
            self._choice.prefilled()

    def prefill_fails(self, error: PenstockError) -> None:
        self._prefill_call = None
        if self._state is State.ANSWERING:
            self._choice.prefilled()
        elif self._state is State.REFUSED:
            self._end()
            self._sink.fail(error)
        else:
            self._choice.suspects = (self._choice.prefill.lease,)
            self.give_up(error)

    # -- decode's leg --------------------------------------------------------------------------------------

    def decode_starts(self, status: int, headers: Headers) -> None:
        if status >= 400:
            choice = self._choice
            blamed = status in (502, 503, 504)  # by decode itself; anything else may as well be prefill's doing
            choice.suspects = (choice.lease,) if blamed else (choice.lease, choice.prefill.lease)
            self._state = State.ANSWERING
            self._cancel_prefill()
            self._sink.start(status, headers + self._names)
            choice.prefill.lease.close()
        else:
            self._sink.start(status, headers + self._names)

    def decode_writes(self, data: bytes) -> None:
        if self._state is State.BOTH:
            self._state = State.ANSWERING
            self._choice.prefilled()
        self._sink.write(data)

    def decode_finishes(self) -> None:
        self._decode_call = None
        self._end()
        self._sink.finish()

    def decode_fails(self, error: PenstockError) -> None:
        self._decode_call = None
        self._choice.suspects = (self._choice.lease,)
        self.give_up(error)

    # -- within --------------------------------------------------------------------------------------------

    def _open(self, instance: Instance, leg: Leg, sink: Sink) -> Call:
        request = msgspec.structs.replace(
            self._request,
            body=leg.body,
            headers=_merged(self._request.headers, leg.headers),
            forms=None,
            stream=self._request.stream if leg.stream is None else leg.stream,
            transfer=leg.transfer,
        )
        return self._upstream(instance).open(instance, request, sink)

    def _open_decode(self, leg: Leg) -> None:
        self._decode_call = self._open(self._choice.decode.instance, leg, DecodeLeg(self))
        if self._paused:
            self._decode_call.pause()

    def _answering_call(self) -> Call | None:
        return self._prefill_call if self._state is State.REFUSED else self._decode_call

    def _end(self) -> None:
        self._state = State.ENDED
        self._cancel_calls()
        self._choice.prefill.lease.close()

    def _cancel_calls(self) -> None:
        self._cancel_prefill()
        self._cancel_decode()

    def _cancel_prefill(self) -> None:
        call, self._prefill_call = self._prefill_call, None
        if call is not None:
            call.cancel()

    def _cancel_decode(self) -> None:
        call, self._decode_call = self._decode_call, None
        if call is not None:
            call.cancel()


class PrefillLeg:
    """The sink of prefill's call."""

    __slots__ = ("fail", "finish", "start", "write")

    def __init__(self, pair: PairCall) -> None:
        self.start = pair.prefill_starts
        self.write = pair.prefill_writes
        self.finish = pair.prefill_finishes
        self.fail = pair.prefill_fails


class DecodeLeg:
    """The sink of decode's call."""

    __slots__ = ("fail", "finish", "start", "write")

    def __init__(self, pair: PairCall) -> None:
        self.start = pair.decode_starts
        self.write = pair.decode_writes
        self.finish = pair.decode_finishes
        self.fail = pair.decode_fails


def _merged(headers: Headers, added: Mapping[bytes, bytes]) -> Headers:
    if not added:
        return headers
    return [(name, value) for name, value in headers if name not in added] + list(added.items())
