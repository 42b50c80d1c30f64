"""One request at two instances, as one call: whoever forwards sees a transport like any other.

    concurrent     both legs are opened at once
    sequential     PREFILL --[its whole answer]--> decode is opened

                         decode's first byte
      PREFILL --> BOTH ----------------------> ANSWERING --[finish, fail]--> ENDED
         |          |                                                          ^
         |          +--[either leg fails, decode refuses: the other is cancelled]
         +----------+--[prefill refuses]--> REFUSED (its answer is the client's) --[finish, fail]--+

* Whatever ends one leg ends the other, in the same turn of the loop. Only once decode has said a byte of its answer
  is prefill's fate of no more concern: decode says nothing before it has the cache.
* Decode's answer is kept back (`Held`) in two cases. A failure that it says before prefill has said anything may be
  for want of a prefill that is dead, which shows within `BLAME_S`; then the attempt failed for prefill's sake, and
  another pair may serve. And an engine that gives requests back in the middle says so at the end of an answer.
* Otherwise prefill's answer is not waited for when decode answers (FastDeploy's may never come), unless `Terms` say
  how long; and it is cut off when decode has ended.
* Prefill's lease is closed here: when prefill is done (the first chunk of a stream, the end of another answer, decode's
  first byte at the latest), or with the call. Decode's belongs to whoever forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from broker.engines.pd import Asked, Leg, given_back
from broker.errors import GivenBack, PenstockError, UpstreamBroken, UpstreamTimeout
from broker.lease import Lease
from broker.types import Instance
from frontend.held import Held
from frontend.timers import Timers
from frontend.upstream.base import Call, Headers, Sink, UpstreamRequest, Upstreams

if TYPE_CHECKING:
    from frontend.pair import PairChoice

PREFILL_URL, DECODE_URL = b"X-Router-Prefill-Url", b"X-Router-Decode-Url"
"""In the spelling that FastDeploy's router has on the wire."""

MAX_PREFILL_ANSWER = 16 * 1024 * 1024
"""What a sequential prefill may answer: one token, and the ids of its blocks."""
OWN_FAILURES = frozenset((502, 503, 504))
"""What decode answers for its own sake; anything else may as well be prefill's doing."""
BLAME_S = 0.1
"""A killed process refuses connections within milliseconds; a failed leg must end the other within 0.2 s."""


class State(Enum):
    PREFILL = 0
    BOTH = 1
    ANSWERING = 2
    REFUSED = 3
    ENDED = 4


class Limit(Enum):
    """What is timed."""

    HOLD = auto()
    PREFILL = auto()
    DECODE = auto()
    WHOLE = auto()


class PairCall:
    """One attempt at one pair; `Call` for whoever forwards. Owns both legs' calls and prefill's lease."""

    __slots__ = (
        "_answer",
        "_answered",
        "_began",
        "_choice",
        "_decode_call",
        "_held",
        "_loop",
        "_make_decode",
        "_names",
        "_paused",
        "_prefill_call",
        "_prefill_spoke",
        "_request",
        "_sink",
        "_state",
        "_terms",
        "_timers",
        "_upstreams",
    )

    def __init__(
        self,
        choice: PairChoice,
        upstreams: Upstreams,
        request: UpstreamRequest,
        sink: Sink,
    ) -> None:
        self._choice = choice
        self._upstreams = upstreams
        self._request = request
        self._sink = sink
        self._terms = choice.pairer.terms
        self._loop = choice.pairer.loop
        self._state = State.PREFILL if choice.pairing.sequential else State.BOTH
        self._prefill_call: Call | None = None
        self._decode_call: Call | None = None
        self._make_decode: Callable[[bytes], Leg]
        self._answer: list[bytes] = []
        self._answered = 0
        self._prefill_spoke = False  # it has said that it takes the request
        self._held: Held | None = None  # decode's answer
        self._paused = False
        self._began = 0.0
        self._timers = Timers(choice.pairer.loop)
        self._names = [
            (PREFILL_URL, choice.prefill.instance.url.encode()),
            (DECODE_URL, choice.decode.instance.url.encode()),
        ]

    def __repr__(self) -> str:
        return f"<PairCall {self._state.name} {self._choice.where}>"

    def begin(self) -> None:
        """Opens the first leg, or both. Raises what the request or the pair cannot do; then nothing was opened."""
        choice, request, terms = self._choice, self._request, self._terms
        asked = Asked(body=request.body, request_id=self._name())
        plan = choice.pairing.plan(asked, choice.prefill.instance, choice.decode.instance, choice.pairer.rng)
        self._make_decode = plan.decode
        self._began = self._loop.time()
        self._time(Limit.PREFILL, terms.prefill_s, "prefill was not done", choice.prefill.lease)
        self._time(Limit.WHOLE, terms.whole_s, "the answer was not whole", choice.lease)
        sink = LegSink(self.prefill_starts, self.prefill_writes, self.prefill_finishes, self.prefill_fails)
        self._prefill_call = self._open(choice.prefill.instance, plan.prefill, sink)
        if not choice.pairing.sequential:
            self._open_decode(plan.decode(b""))

    def _name(self) -> str:
        """What the engines call the request. Another attempt is another request to them: one that both attempts ask
        may not have forgotten the first, and FastDeploy's refuse a name that they know."""
        again = self._choice.given_up
        return f"{self._request.request_id}-retry{again}" if again else self._request.request_id

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
        waits = self._held is not None and self._held.waits
        if (call := self._answering_call()) is not None and not waits:
            call.resume()

    def give_up(self, error: PenstockError) -> None:
        """Ends the attempt with an error; whoever forwards may try another pair from within, so what is held here is
        let go afterwards: the policy sees those who failed as no emptier than they were."""
        if self._state is State.ENDED:
            return
        self._state = State.ENDED
        self._timers.clear()
        self._cancel_calls()
        error.headers, error.request_id = tuple(self._names), self._request.request_id
        self._sink.fail(error)
        self._choice.prefill.lease.close()

    # -- prefill's leg -------------------------------------------------------------------------------------

    def prefill_starts(self, status: int, headers: Headers) -> None:
        if self._state in (State.ANSWERING, State.ENDED):
            return
        if 200 <= status < 300:
            self._prefill_spoke = True
            self._wait_no_more()
            return
        # Without its cache decode would wait for ever, so the refusal is the answer, whatever the dialect says of it.
        self._state = State.REFUSED
        self._choice.suspects = (self._choice.prefill.lease,)
        self._timers.clear(keep=Limit.WHOLE)
        self._held = None
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
            self._prefilled()

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
            self._prefilled()
            self._open_decode(leg)
        else:
            self._prefilled()

    def prefill_fails(self, error: PenstockError) -> None:
        self._prefill_call = None
        if self._state is State.ANSWERING:
            self._prefilled()
        elif self._state is State.REFUSED:
            self._end()
            self._sink.fail(error)
        else:
            self._choice.suspects = (self._choice.prefill.lease,)
            self.give_up(error)

    def _prefilled(self) -> None:
        self._choice.prefilled()
        self._timers.stop(Limit.PREFILL)
        if self._state is State.BOTH and Limit.DECODE not in self._timers:
            self._time(Limit.DECODE, self._terms.decode_s, "decode did not begin", self._choice.lease)

    # -- decode's leg --------------------------------------------------------------------------------------

    def decode_starts(self, status: int, headers: Headers) -> None:
        well = 200 <= status < 300
        gathers = well and not self._request.stream and self._choice.pairing.gives_back
        held = self._held = Held(status, headers, gathers=gathers)
        patience_s = self._patience(status)
        if patience_s > 0 and self._decode_call is not None:
            held.waits = True
            self._decode_call.pause()
            self._timers.start(Limit.HOLD, patience_s, self._wait_no_more)
        self._pass_on()

    def decode_writes(self, data: bytes) -> None:
        held = self._held
        if held is None:
            self._answers()
            self._sink.write(data)
            return
        held.add(data)
        if not held.waits:
            self._answers()
            self._pass_on()

    def decode_finishes(self) -> None:
        self._decode_call = None
        if self._held is None:
            self._end()
            self._sink.finish()
        else:
            self._held.is_whole = True
            self._pass_on()

    def decode_fails(self, error: PenstockError) -> None:
        self._decode_call = None
        self._choice.suspects = (self._choice.lease,)
        self.give_up(error)

    def _answers(self) -> None:
        """Decode has said a byte of its answer."""
        if self._state is State.BOTH:
            self._state = State.ANSWERING
            self._prefilled()
            self._timers.stop(Limit.DECODE)

    # -- an answer that is kept back -----------------------------------------------------------------------

    def _patience(self, status: int) -> float:
        """How long decode's answer waits for prefill's word."""
        if self._choice.pairing.sequential or self._prefill_spoke or self._prefill_call is None:
            return 0.0
        if status >= 500 and status not in OWN_FAILURES:
            return BLAME_S
        if status >= 300:
            return 0.0
        return self._began + self._terms.awaits_prefill_s - self._loop.time()

    def _wait_no_more(self) -> None:
        """Prefill has spoken, or will not soon."""
        self._timers.stop(Limit.HOLD)
        if self._held is None or not self._held.waits:
            return
        self._held.waits = False
        call = self._decode_call
        self._pass_on()
        if call is not None and call is self._decode_call and not self._paused:
            call.resume()

    def _pass_on(self) -> None:
        """Passes decode's answer on, if nothing keeps it back any more."""
        held, choice = self._held, self._choice
        if held is None or held.stays:
            return
        self._held = None
        if held.gathers and held.is_whole and given_back(held.body):
            choice.suspects = (choice.lease,)
            self.give_up(GivenBack("decode had no room to go on, and gave the request back"))
            return
        if held.status >= 400:
            itself = held.status in OWN_FAILURES
            choice.suspects = (choice.lease,) if itself else (choice.lease, choice.prefill.lease)
            self._state = State.ANSWERING
            self._timers.clear(keep=Limit.WHOLE)
            self._cancel_prefill()
            self._sink.start(held.status, held.headers + self._names)
            choice.prefill.lease.close()
        else:
            self._sink.start(held.status, held.headers + self._names)
        if (body := held.body) and not self._is_over():
            self._answers()
            self._sink.write(body)
        if held.is_whole and not self._is_over():
            self._end()
            self._sink.finish()

    def _is_over(self) -> bool:
        """A function: what the sink hears may end the call."""
        return self._state is State.ENDED

    # -- limits --------------------------------------------------------------------------------------------

    def _time(self, limit: Limit, seconds: float, said: str, suspect: Lease) -> None:
        if seconds:
            self._timers.start(limit, seconds, partial(self._expire, f"{said} within {seconds:g} s", suspect))

    def _expire(self, said: str, suspect: Lease) -> None:
        self._choice.suspects = (suspect,)
        self.give_up(UpstreamTimeout(said))

    # -- within --------------------------------------------------------------------------------------------

    def _open(self, instance: Instance, leg: Leg, sink: Sink) -> Call:
        request = self._request.leg(
            leg.body,
            leg.headers_of(self._request.headers),
            stream=self._request.stream if leg.stream is None else leg.stream,
            transfer=leg.transfer,
        )
        return self._upstreams.upstream(instance).open(instance, request, sink)

    def _open_decode(self, leg: Leg) -> None:
        sink = LegSink(self.decode_starts, self.decode_writes, self.decode_finishes, self.decode_fails)
        self._decode_call = self._open(self._choice.decode.instance, leg, sink)
        if self._paused:
            self._decode_call.pause()

    def _answering_call(self) -> Call | None:
        return self._prefill_call if self._state is State.REFUSED else self._decode_call

    def _end(self) -> None:
        self._state = State.ENDED
        self._timers.clear()
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


class LegSink(Sink):
    """Hears one leg's call, and has these say what it means."""

    __slots__ = ("_fail", "_finish", "_start", "_write")

    def __init__(
        self,
        start: Callable[[int, Headers], None],
        write: Callable[[bytes], None],
        finish: Callable[[], None],
        fail: Callable[[PenstockError], None],
    ) -> None:
        self._start = start
        self._write = write
        self._finish = finish
        self._fail = fail

    def start(self, status: int, headers: Headers) -> None:
        self._start(status, headers)

    def write(self, data: bytes) -> None:
        self._write(data)

    def finish(self) -> None:
        self._finish()

    def fail(self, error: PenstockError) -> None:
        self._fail(error)
