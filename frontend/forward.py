"""One request on its way: a synchronous state machine between a client's sink and the instances that are tried.

              open                 first body byte              finish
    NEW ---------------> TRYING ------------------> FLOWING ---------------> ENDED
     |                  |  ^  |                        |                       ^
     +--> WAITING ------+--|--|--- timeout, full ------|-----------------------+
    saturated    granted|  |  |                        |                       |
                        +--+  +--- finish, last fail --|-----------------------+
          fail, 502, 503:                              +--- fail, idle --------+
          another instance                cancel, from anywhere ---------------+

* Status and headers are held back until the first body byte or the end: an engine that dies right after its headers
  costs the client nothing, another one is tried. After the first byte nothing can be repeated, and a failure is
  said to the client.
* Each attempt has its own lease. The next one is taken before the last one is given back, so that the policy sees
  the instance that failed as no emptier than it was.
* `_end` is the one way out. Whatever happened, it stops the timer, cancels the call, closes the lease, accounts for
  the request and writes its log line, exactly once.

Nothing here awaits, and nothing is made per chunk: any server that can call four methods can drive it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from broker.counters import CounterColumn, Histogram, TotalColumn
from broker.counters import outcome as status_column
from broker.errors import (
    ClientTooSlow,
    EngineSaturated,
    ModelNotFound,
    NoInstance,
    PenstockError,
    UpstreamBroken,
    UpstreamError,
    UpstreamTimeout,
)
from broker.lease import Lease
from broker.route import RouteRequest
from frontend import explain
from frontend.account import Outcome, access, count_response, log_end
from frontend.decisions import Failed, Granted, Queued, Record, Rescued, Sent, Step
from frontend.dispatch import Chosen
from frontend.explain import DECISION
from frontend.headers import are_of_events
from frontend.story import Story
from frontend.upstream.base import AnswerHead, Call, Headers, Sink, UpstreamRequest
from frontend.waiting import Place, Saturated
from shm.cells import add

if TYPE_CHECKING:
    from frontend._conduit import Conduit
    from frontend.forwarder import Forwarder

FAILED_STATUSES = frozenset((502, 503, 504))
"""Answers that count as failures of the instance."""

QUEUE_MS = b"x-penstock-queue-ms"
"""Tells a client whose request waited for room how long it did."""


_DATA: Final = b"data:"
_LF: Final = 0x0A
_OPENED: Final = int(TotalColumn.STREAMS_OPENED)
_CLOSED: Final = int(TotalColumn.STREAMS_CLOSED)


class State(Enum):
    NEW = 0
    TOKENIZING = 1  # the tokenizer service has been asked what the prompt's tokens are
    QUEUED = 2  # there is no room anywhere: it stands in line
    TRYING = 3  # at an instance, and nothing of an answer is with the client
    FLOWING = 4
    ENDED = 5


# Looked at for every request or chunk, and a member of an enum costs more than what is done with it.
_TRYING: Final = State.TRYING
_FLOWING: Final = State.FLOWING
_ENDED: Final = State.ENDED
_DONE: Final = Outcome.DONE
_FIRST_TOKEN: Final = Histogram.FIRST_TOKEN
_DURATION: Final = Histogram.DURATION


class Forward(Sink):
    """One request. Its owner is whoever talks to the client: it calls `begin` once and, whatever happens, `cancel`
    at the end. It is itself the sink of each attempt; the client's sink hears of one answer.
    """

    def __init__(
        self,
        shared: Forwarder,
        ident: bytes,
        name: str,
        path: str,
        model: str | None,
        sink: Sink,
        asked: tuple[RouteRequest, UpstreamRequest] | None,
        story: Story | None,
        explains: bool,
        steps: list[Step] | None,
    ) -> None:
        """`explains`: the answer says in a header why its instance was chosen."""
        self._shared = shared
        self._ident = ident
        self._name = name  # what else it is called, with pairs
        self._path = path
        self._model = model
        self._sink = sink
        self._asked = asked
        """Until the first byte, for the next attempt; then let go: a stream's prompt is not kept for its length."""
        self._story = story
        self._explains = explains
        self._steps = steps
        """What happened to it, once that is more than being sent somewhere, or if its client asks why."""
        self._state = State.NEW
        self._choice: Chosen | None = None  # of the attempt under way, or the last one
        self._call: Call | None = None  # None once the transport has ended it
        self._head: tuple[int, Headers] | None = None  # held back
        self._timer: asyncio.TimerHandle | None = None
        self._tried: tuple[int, ...] = ()
        self._attempts = 0
        self._paused = False
        self._place: Place | None = None  # while TOKENIZING or QUEUED: what is given up when the request ends
        self._waited: float | None = None  # how long it stood there
        self._stolen_from = "-"
        self._rescued_from = "-"
        self._began = 0.0
        self._touched = 0.0
        self._first_byte: float | None = None
        self._status = 0  # what the client was told, or would have been
        self._bytes = 0
        self._events = 0
        self._last = b""  # the last chunk
        self._tail = b""  # and the one before it
        self._conduit: Conduit | None = None  # what it has counted is not yet among these

    def __repr__(self) -> str:
        where = self._choice.where if self._choice else None
        return f"Forward({self._ident.decode()}, {self._state.name}, at={where}, attempts={self._attempts})"

    @property
    def ident(self) -> str:
        """How it is called in an answer to `POST /v1/abort_requests`."""
        return self._name or self._ident.decode("ascii")

    @property
    def names(self) -> tuple[str, ...]:
        """By which a client may know it."""
        return (self._ident.decode("ascii"), self._name)

    @property
    def tokens_so_far(self) -> int:
        """Tokens the client has got, by the events of its stream; 0 for an answer that comes at once.

        Exact where an engine sends an event for each token (a chat's first one names the role).
        """
        events = self._events if self._conduit is None else self._events + self._conduit.events
        return max(0, events - ("/chat/" in self._path))

    # -- the client's side -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Chooses an instance and sends the request. Without one the sink hears `fail` before this returns."""
        shared = self._shared
        self._state = _TRYING
        self._began = shared.clock()
        shared.live.add(self)
        add(shared.counters.totals, _OPENED, 1)
        assert self._asked is not None
        tokenizer, text = shared.tokenizer, self._asked[0].prompt
        if tokenizer is None or not text:
            self._choose(self._began)
        elif (ids := tokenizer.known(text)) is not None:
            self._tokenized(ids)
        else:
            self._state = State.TOKENIZING
            self._place = tokenizer.ask(text, self._tokenized)

    def _tokenized(self, ids: Sequence[int]) -> None:
        """The prompt's tokens; none if they are not known."""
        assert self._asked is not None
        route, request = self._asked
        self._place = None
        self._state = State.TRYING
        self._asked = route.with_ids(ids), request
        self._choose(self._shared.clock())

    def _choose(self, now: float) -> None:
        assert self._asked is not None
        try:
            choice = self._shared.dispatcher.choose(self._asked[0], (), now)
        except Saturated as saturated:
            self._stand(saturated, None)
        except PenstockError as error:
            self.refused(error)
        else:
            self._open(choice)

    def _stand(self, saturated: Saturated, since: float | None) -> None:
        """In line; from `since` on if it has stood there before."""
        assert self._asked is not None
        route, request = self._asked
        since_ns = None if since is None else int(since * 1e9)
        self._state = State.QUEUED
        self._took(Queued(self._shared.clock(), saturated.home, saturated.considered))
        self._place = saturated.line.wait(route, request.headers, saturated.home, self, since_ns)

    def cancel(self) -> None:
        """The client is gone. Idempotent, and without effect once the request has ended."""
        if self._state is State.NEW:
            self._state = State.ENDED
        elif self._state is not State.ENDED:
            if self._state is not State.FLOWING:
                self._status = 499
            self._end(Outcome.GONE)

    def abort(self, error: PenstockError) -> None:
        """Ends the request with an error that the client hears, whatever the instance does."""
        if self._state not in (State.NEW, State.ENDED):
            self._say(error)

    def pause(self) -> None:
        """The client does not keep up."""
        self._paused = True
        self._touched = self._shared.clock()
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._paused = False
        self._touched = self._shared.clock()  # the silence so far was the client's
        if self._call is not None:
            self._call.resume()

    # -- the line's side ---------------------------------------------------------------------------------------

    def granted(self, choice: Chosen, waited_s: float, home: str) -> None:
        self._place = None
        self._waited = waited_s
        if home != choice.instance.url:
            self._stolen_from = home
        self._took(Granted(self._shared.clock(), waited_s, home))
        self._open(choice)

    @property
    def pending(self) -> tuple[Lease, float, RouteRequest] | None:
        """Lease, time of sending and what decided the choice, while the first attempt has no first byte."""
        if self._state is not State.TRYING or self._attempts != 1 or self._choice is None or self._asked is None:
            return None
        return self._choice.lease, self._began + (self._waited or 0.0), self._asked[0]

    def rescue(self, choice: Chosen) -> None:
        """Takes a `pending` request back from its instance and sends it to a better one, whose lease it gets."""
        last, call = self._choice, self._call
        assert last is not None
        self._call = None
        self._rescued_from = last.where
        self._took(Rescued(self._shared.clock(), last.where))
        last.lease.count(CounterColumn.RESCUED)
        last.lease.close()
        if call is not None:
            call.cancel()
        self._open(choice)

    def refused(self, error: PenstockError) -> None:
        self._place = None
        if isinstance(error, ModelNotFound):
            self._shared.counters.count(TotalColumn.MODEL_NOT_FOUND)
        elif isinstance(error, NoInstance):
            self._shared.counters.count(TotalColumn.NO_INSTANCE)
        self._say(error)

    # -- the instance's side: the sink of each attempt ---------------------------------------------------------

    @property
    def takes_whole(self) -> bool:
        return True

    def start(self, status: int, headers: Headers) -> None:
        assert self._choice is not None
        if status in FAILED_STATUSES:
            self._failed()
        retried = self._shared.face.retries_answers and status in self._choice.retried
        if status >= 400 and retried and self._try_another(f"status {status}"):
            return
        self._head = (status, headers)
        if self._timer is None and self._shared.idle_s and are_of_events(headers):
            self._touched = self._shared.clock()
            self._arm(self._shared.idle_s)  # from its head on, a stream may not be silent for longer

    def write(self, data: bytes) -> None:
        if self._head is not None:
            self._flow()
        elif self._conduit is not None:
            self._count_conduit()
        self._touched = self._shared.clock()
        self._bytes += len(data)
        self._events += _events(data, 0, len(data))
        self._tail, self._last = self._last, data
        if self._state is _FLOWING:  # the client's sink may have given up on hearing the status
            self._sink.write(data)

    def chunk(self, framed: bytes, size: int) -> None:
        """As `write`, for a chunk that the client may get as it is."""
        if self._state is not _FLOWING:
            self.write(framed[-size - 2 : -2])
            return
        if self._conduit is not None:
            self._count_conduit()
        self._touched = self._shared.clock()
        self._bytes += size
        self._events += _events(framed, len(framed) - size - 2, len(framed) - 2)
        self._tail, self._last = self._last, framed
        self._sink.chunk(framed, size)

    def conduit(self) -> Conduit | None:
        if self._state is not _FLOWING or self._paused:
            return None
        self._count_conduit()
        self._conduit = self._sink.conduit()
        return self._conduit

    def unsent(self, data: bytes) -> None:
        self._sink.unsent(data)

    def finish(self) -> None:
        self._call = None
        if self._head is not None:
            self._flow()
        if self._state is State.FLOWING:
            if self._status not in FAILED_STATUSES and self._choice is not None:
                self._shared.dispatcher.breaker.succeeded(self._choice.lease.slot)
            self._end(Outcome.DONE)
            self._sink.finish()
        elif self._state is State.TRYING:
            self.fail(UpstreamBroken("the engine ended its answer before it began"))

    def answer(self, head: AnswerHead, data: bytes) -> None:
        """As `start`, `write` and `finish`, for an answer that is whole: nothing can go wrong any more."""
        self._call = None
        if self._waited is not None or self._explains:
            self.start(200, head.fitting(data))
            self.write(data)
            self.finish()
            return
        choice, shared = self._choice, self._shared
        assert choice is not None
        self._status = 200
        self._bytes = len(data)
        self._last = data
        now = shared.clock()
        self._first_byte = now - self._began
        choice.lease.answered()
        if shared.dispatcher.breaker.suspects:
            shared.dispatcher.breaker.succeeded(choice.lease.slot)
        shared.counters.observe(_FIRST_TOKEN, self._first_byte)
        self._end(_DONE, now)
        self._sink.answer(head, data)

    def fail(self, error: PenstockError) -> None:
        self._call = None
        if isinstance(error, UpstreamError) and not isinstance(error, EngineSaturated):  # busy is not broken
            self._failed()
        if self._story is not None and self._state is State.TRYING and self._choice is not None:
            self._story.attempt_failed(self._attempts, self._shared.attempts, self._choice, error.message)
        if self._state is State.TRYING and error.retryable and self._try_another(error.message):
            return
        self._say(error)

    # -- within ------------------------------------------------------------------------------------------------

    def _open(self, choice: Chosen) -> None:
        assert self._asked is not None
        shared = self._shared
        self._state = _TRYING
        self._choice = choice
        self._head = None
        self._attempts += 1
        shared.dispatcher.placed(self._asked[0], choice)
        if self._steps is not None:
            at_once = self._attempts == 1 and self._waited is None
            self._steps.append(Sent(self._began if at_once else shared.clock(), choice))
        if self._story is not None:
            self._story.chosen(choice.legs)
        if shared.first_byte_s:
            self._arm(shared.first_byte_s)
        self._call = choice.open(shared, self._asked[1], self)
        if self._paused:
            self._call.pause()

    def _took(self, step: Step) -> None:
        """Something out of the ordinary, for those who ask later."""
        if self._steps is None:
            if self._shared.decisions is None:
                return
            self._steps = self._so_far()
        self._steps.append(step)

    def _so_far(self) -> list[Step]:
        """Nothing, or that it was sent."""
        return [] if self._choice is None else [Sent(self._began, self._choice)]

    def record(self, duration_s: float | None = None, outcome: Outcome | None = None) -> Record:
        """The request as it stands."""
        return Record(
            ident=self._ident,
            name=self._name,
            path=self._path,
            model=self._model,
            began=self._began,
            steps=self._so_far() if self._steps is None else self._steps,
            status=self._status,
            outcome=outcome,
            first_byte_s=self._first_byte,
            duration_s=self._shared.clock() - self._began if duration_s is None else duration_s,
        )

    def _try_another(self, why: str) -> bool:
        """Moves the request to another instance; False when attempts or instances are used up."""
        shared, last = self._shared, self._choice
        if last is None or self._asked is None or self._attempts >= shared.attempts:
            return False
        self._tried += tuple([suspect.slot for suspect in last.suspects])
        try:
            choice = shared.dispatcher.choose(self._asked[0], self._tried, shared.clock())
        except Saturated as saturated:  # it had a place at another host; now it needs one here
            self._give_up(last, why)
            self._choice = None
            self._disarm()
            self._stand(saturated, self._began)
            return True
        except PenstockError:
            return False  # what this instance said is a better answer than "no instance"
        self._give_up(last, why)
        self._open(choice)
        return True

    def _give_up(self, last: Chosen, why: str) -> None:
        """Ends an attempt after which another one follows."""
        next((suspect for suspect in last.suspects if not suspect.closed), last.lease).count(CounterColumn.RETRIED)
        self._took(Failed(self._shared.clock(), last.where, why))
        call, self._call = self._call, None
        last.lease.close()
        if call is not None:
            call.cancel()

    def _flow(self) -> None:
        """The first body byte, or the end of an empty answer: from here on nothing can be repeated."""
        assert self._head is not None
        assert self._choice is not None
        shared = self._shared
        (self._status, headers), self._head = self._head, None
        self._state = State.FLOWING
        self._asked = None
        self._touched = shared.clock()
        self._first_byte = self._touched - self._began
        self._choice.lease.answered()
        if self._status not in FAILED_STATUSES:
            shared.dispatcher.breaker.answers(self._choice.lease.slot)
        shared.counters.observe(_FIRST_TOKEN, self._first_byte)
        if shared.first_byte_s:
            self._disarm()
        if self._timer is None and shared.idle_s and self._call is not None:  # else a stream's has run since its head
            self._arm(shared.idle_s)
        if self._waited is not None:
            headers = [*headers, (QUEUE_MS, b"%.1f" % (self._waited * 1e3))]
        if self._explains and self._steps:
            headers = [*headers, (DECISION, explain.line(self._steps, shared.policies))]
        self._sink.start(self._status, headers)

    def _arm(self, delay: float) -> None:
        self._disarm()
        self._timer = self._shared.loop.call_later(delay, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """The timer's end. It is not moved for each chunk: it looks how long the silence has really been."""
        self._timer = None
        shared = self._shared
        if self._state is State.TRYING and (self._head is None or shared.first_byte_s):
            self._failed()
            self._say(UpstreamTimeout(f"no answer within {shared.first_byte_s:g} s"))
            return
        touched = self._touched if self._conduit is None else max(self._touched, self._conduit.touched)
        left = touched + shared.idle_s - shared.clock()
        if left > 0:
            self._arm(left)
        elif self._paused:  # nothing is read from the engine: the silence is the client's
            self._say(ClientTooSlow(f"the client read nothing for {shared.idle_s:g} s"))
        else:
            self._failed()
            self._say(UpstreamTimeout(f"the stream was silent for {shared.idle_s:g} s"))

    def _failed(self) -> None:
        assert self._choice is not None
        for suspect in self._choice.suspects:
            self._shared.dispatcher.breaker.failed(suspect.slot, suspect.generation, self._shared.clock())

    def _say(self, error: PenstockError) -> None:
        """Ends the request with an error that the client hears."""
        if self._shared.pairs:
            error.request_id = self._name
        if self._story is not None:
            self._story.failed(error, paired=self._shared.pairs, began=self._state is State.FLOWING)
        where = self._choice.where if self._choice is not None else "-"
        self._took(Failed(self._shared.clock(), where, error.message))
        reason = error.message if error.public is not None else None
        if self._state is State.FLOWING:
            self._end(Outcome.BROKEN, reason=reason)
        else:
            self._status = self._shared.face.error(error).status
            self._end(Outcome.FAILED, reason=reason)
            if self._explains and self._steps and self._attempts:
                error = error.with_header(DECISION, explain.line(self._steps, self._shared.policies))
        self._sink.fail(error)

    def _count_conduit(self) -> None:
        """It is over; what it has counted is ours."""
        conduit, self._conduit = self._conduit, None
        if conduit is not None and conduit.size:
            self._touched = conduit.touched
            self._bytes += conduit.size
            self._events += conduit.events
            self._tail = conduit.tail or (self._last if conduit.events < 2 else b"")  # what came before one event
            self._last = conduit.last

    def _end(self, outcome: Outcome, now: float | None = None, reason: str | None = None) -> None:
        """`now`: if the caller knows it already. `reason`: of a failure, if the client is not told it."""
        self._state = _ENDED
        if self._timer is not None:
            self._disarm()
        if self._conduit is not None:
            self._count_conduit()
        shared, counters, choice = self._shared, self._shared.counters, self._choice
        shared.live.discard(self)
        add(counters.totals, _CLOSED, 1)
        count_response(counters, self._status)
        duration = (shared.clock() if now is None else now) - self._began
        if shared.decisions is not None:
            if self._steps is None and outcome is _DONE and self._status < 400 and choice is not None:
                first, ident, name, path = self._first_byte, self._ident, self._name, self._path
                shared.decisions.smooth(
                    (ident, name, path, self._model, self._began, choice, self._status, first, duration)
                )
            else:
                shared.decisions.notable(self.record(duration, outcome))
        if choice is not None:
            counters.observe(_DURATION, duration)
            lease = choice.lease
            if outcome is not _DONE:
                if outcome is Outcome.BROKEN:
                    lease.count(CounterColumn.BROKEN)
                elif outcome is Outcome.GONE:
                    lease.count(CounterColumn.GONE)
            counted = self._first_byte is not None or shared.face.counts_unanswered
            if counted and shared.pairs and len(choice.legs) > 1:
                shared.pairings.count(choice.legs[0].instance.url, lease, self._status)
            lease.close(status_column(self._status) if counted else None)
        if self._place is not None:
            place, self._place = self._place, None
            place.leave()
        if self._call is not None:
            call, self._call = self._call, None
            call.cancel()
        if self._story is not None:
            left = outcome is Outcome.GONE
            self._story.ended(self._status, duration, completed=self._first_byte is not None, left=left)
        elif access.is_on:
            log_end(
                ident=self._ident,
                path=self._path,
                model=self._model,
                instance=choice.where if choice is not None else "-",
                policy=shared.policy,
                attempts=self._attempts,
                status=self._status,
                queued_s=self._waited,
                stolen_from=self._stolen_from,
                rescued_from=self._rescued_from,
                first_byte_s=self._first_byte,
                duration_s=duration,
                size=self._bytes,
                end=(self._last, self._tail),
                outcome=outcome,
                reason=reason,
            )


def _events(data: bytes, start: int, end: int) -> int:
    """Events in a chunk, which is there within `data`; where tokens must be told before the engine says its usage.

    Nearly all are one line and an empty one: then there is one, and `count` need not look (compiled: a third of it)."""
    if start + 2 < end:  # compiled, a slice with an end before its start is a `SystemError` (mypyc 2.4)
        line = data[start : end - 2]
        if line.startswith(_DATA) and _LF not in line:
            return 1
    return data.count(_DATA)
