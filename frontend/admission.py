"""Requests that find every candidate saturated: they wait here, in the scheduler's line, until they are granted one.

    choose ---- the choice has room ------------------------------> Choice          neither queue nor scheduler is asked
       |  ---- another one has -----------------------------------> Choice
       |
       +----- none has ---> Saturated.wait --> offered --> granted -> lease -> taken
                                                  |           |
                                                  |           +-- the instance has changed: returned, to its old place
                                                  +-- deadline, full, client gone, nobody serves it any more

A request's body never leaves this process. What a turn of the loop has to say to the scheduler is one message; what is
lost with a scheduler is said again to the next one. While none is alive, requests wait all the same, in order, and each
frontend starts its own as it sees room.

Nothing here awaits: whoever waits is called back.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Collection

from broker import wire
from broker.config import Config
from broker.counters import FrontendCounters, Histogram, TotalColumn
from broker.errors import PenstockError, QueueFull, QueueTimeout
from broker.route import RouteRequest
from broker.saturation import Saturation
from broker.types import Instance
from broker.view import TableReader
from frontend.dispatch import Choice, Chooser, Chosen, Dispatcher, RemoteChoice
from frontend.remote import Guests
from frontend.standing import Waiting, standing
from frontend.upstream.base import Headers
from frontend.waiting import Saturated, Waiter

TICK_S = 0.01
"""How often, while requests wait, unsent messages are sent again, and room is looked for when no scheduler is alive."""
PER_MESSAGE = 64
"""Tickets in one message: with the longest names it stays within `wire.MAX_CONTROL_BYTES`."""
ALONE = 64
"""Waiting requests that are tried per tick when no scheduler is alive."""
ATTEMPTS = 4
"""Choices that turned out full in the meantime, until the request waits."""


class Admission(Chooser):
    """A frontend's `Chooser` of single instances. Owns its waiting requests; everything on the loop's thread."""

    def __init__(
        self,
        config: Config,
        table: TableReader,
        dispatcher: Dispatcher,
        counters: FrontendCounters,
        life: int,
        loop: asyncio.AbstractEventLoop,
        send: Callable[[wire.Tickets], bool],
        forget: Callable[[Instance], None] = lambda _: None,
    ) -> None:
        """`send` says whether the scheduler will get the message; `forget` hears of instances of other hosts that are
        no longer used."""
        super().__init__(dispatcher.breaker)
        self.loop = loop
        self.timeout_s = config.scheduler.queue_timeout_secs
        self._table = table
        self._dispatcher = dispatcher
        self._counters = counters
        self._who = counters.index, life
        self._send = send
        self._saturation = Saturation(table, config.scheduler.instance_capacity)
        self._header = config.scheduler.fairness_header.lower().encode()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Waiting] = {}  # in the order of their coming
        self._offers: dict[int, Waiting] = {}  # what is to be said, until it is sent
        self._withdrawn: list[int] = []
        self._taken: list[int] = []
        self._returned: list[int] = []
        self._held: dict[str, wire.RemoteLease] = {}  # to be said again
        self._ended: list[wire.RemoteLease] = []
        self._on_close = self._closed  # bound once, not for each lease
        self._guests = Guests(config.shm.slots, dispatcher.breaker, loop, self._ended_there, forget)
        self._freed = False
        self._announces = False
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"Admission({len(self._waiting)} waiting, {len(self._offers)} of them not offered yet)"

    def close(self) -> None:
        self._guests.close()
        if self._timer is not None:
            self._timer.cancel()

    # -- choosing ------------------------------------------------------------------------------------------

    def choose(self, request: RouteRequest, tried: Collection[int], now: float, unfit: Collection[int] = ()) -> Choice:
        """As the policy says, if there is room; else whatever has room, as the policy says.

        Raises `Saturated` where it can be waited for. A request that failed elsewhere does not wait again: it goes
        to the next instance, full or not. But one that failed at another host has had no place here yet.
        """
        if tried and self._guests.are_all(tried):
            tried = ()
        if self._waiting and not tried and not self._is_alive():
            # Nobody holds the instances for those in line but us.
            raise Saturated(self, next(iter(self._waiting.values())).home)
        return self._choose(request, tried, now, unfit)

    def complete(self, request: RouteRequest, now: float, unfit: Collection[int], *, full: bool) -> Choice:
        """As `choose`, for one that has been granted its other leg: it has had its turn. `full`: room or not."""
        return self._choose(request, (), now, unfit, full=full)

    def _choose(
        self,
        request: RouteRequest,
        tried: Collection[int],
        now: float,
        unfit: Collection[int] = (),
        *,
        full: bool = False,
    ) -> Choice:
        choice = self._dispatcher.choose(request, tried, now, unfit)
        if not tried and not full and not self._fits(choice.lease.slot):
            choice = self._another(request, choice, now, unfit)
        choice.lease.on_close = self._on_close
        return choice

    def placed(self, request: RouteRequest, chosen: Chosen) -> None:
        if not isinstance(chosen, RemoteChoice):  # what other hosts' instances have cached is not known here
            self._dispatcher.placed(request, chosen)

    def claim(self, request: RouteRequest, slot: int, generation: int) -> Choice | None:
        """That very instance; None: it has changed."""
        choice = self._dispatcher.claim(request, slot, generation, time.monotonic())
        if choice is not None:
            choice.lease.on_close = self._on_close
        return choice

    def _fits(self, slot: int) -> bool:
        """Whether the lease just taken there is within its room, and overtakes nobody in line."""
        if self._saturation.room(slot) < 0:
            return False
        return not self._saturation.is_held(slot) or not self._is_alive()

    def give_back(self, choice: Choice) -> None:
        """It was granted, and cannot be used: the next in line may have it."""
        choice.lease.withdraw()
        self._closed(choice.lease.slot)

    def _another(self, request: RouteRequest, choice: Choice, now: float, never: Collection[int]) -> Choice:
        home, considered = choice.lease.slot, choice.considered
        broken = self.breaker.open_slots(now)
        for _ in range(ATTEMPTS):
            # Counted before it is looked at, so two frontends cannot both take the last place; both may give it back.
            choice.lease.withdraw()
            held = self._is_alive()
            slots: list[int] = self._table.view(request.role, request.model).slots.tolist()
            unfit = {slot for slot in slots if self._saturation.room(slot) < 1}
            unfit |= {slot for slot in slots if held and self._saturation.is_held(slot)}
            unfit.update(never)
            if not any(slot not in unfit and slot not in broken for slot in slots):
                break
            choice = self._dispatcher.choose(request, (), now, unfit=unfit)
            if self._fits(choice.lease.slot):
                return choice
        choice.lease.withdraw()
        raise Saturated(self, home, considered)

    def _is_alive(self) -> bool:
        return self._table.alive(time.monotonic_ns())

    def _closed(self, slot: int) -> None:
        """A lease of ours ended. Those in line are told of it at once."""
        if self._saturation.is_held(slot):
            self._freed = True
            self._flush_soon()

    # -- waiting -------------------------------------------------------------------------------------------

    def wait(
        self, route: RouteRequest, headers: Headers, home: int, waiter: Waiter, since_ns: int | None = None
    ) -> Waiting:
        """Puts the request in line; `home` is the slot that the policy preferred. `since_ns`: it has waited before."""
        self._counters.count(TotalColumn.QUEUED)
        now_ns = time.monotonic_ns()
        waiting = Waiting(
            next(self._numbers),
            route,
            home,
            waiter,
            *standing(headers, self._header),
            self.cached(route, home),
            now_ns if since_ns is None else min(since_ns, now_ns),
            since_ns is None,  # who waits again has failed at another host
            self.leave,
        )
        left_s = self.timeout_s - (now_ns - waiting.since_ns) / 1e9
        waiting.deadline = self.loop.call_later(max(0.0, left_s), self.expire, waiting)
        self._waiting[waiting.number] = self._offers[waiting.number] = waiting
        self._flush_soon()
        return waiting

    def cached(self, route: RouteRequest, home: int) -> dict[int, int]:
        """What a ticket says of its prompt. Right after the choice that found no room, so nothing is looked up anew."""
        every = self._dispatcher.cached(route)
        if len(every) <= wire.MOST_CACHED:
            return dict(every)
        most = heapq.nlargest(wire.MOST_CACHED, every, key=lambda slot: (slot == home, every[slot]))
        return {slot: every[slot] for slot in most}

    def leave(self, waiting: Waiting) -> None:
        if self._forget(waiting) is not None:
            self._withdraw(waiting.number)

    def expire(self, waiting: Waiting) -> None:
        """Its time is over."""
        if self._forget(waiting) is not None:
            self._withdraw(waiting.number)
            self._counters.count(TotalColumn.QUEUE_TIMEOUT)
            waiting.waiter.refused(
                QueueTimeout(
                    f"no instance had room within {self.timeout_s:g} s; {len(self._waiting)} more requests wait "
                    "at this frontend"
                )
            )

    def offer_again(self) -> None:
        """The scheduler knows nothing of what waits here: it is another one, or thought us dead."""
        self._offers.update(self._waiting)
        self._taken, self._returned, self._withdrawn = [], [], []
        self._held = dict(self._guests.held)
        self._announces = True
        self._flush_soon()

    def _forget(self, waiting: Waiting) -> Waiting | None:
        if waiting.deadline is not None:
            waiting.deadline.cancel()
        return self._waiting.pop(waiting.number, None)

    def _withdraw(self, number: int) -> None:
        if self._offers.pop(number, None) is None:
            self._withdrawn.append(number)
            self._flush_soon()

    # -- the scheduler's answers ---------------------------------------------------------------------------

    def hear(self, message: wire.Grants) -> None:
        for grant in message.granted:
            self._granted(grant)
        for remote in message.remote:
            self._granted(remote)
        for refusal in message.refused:
            if (waiting := self._waiting.get(refusal.number)) is not None:
                self._forget(waiting)
                self._counters.count(TotalColumn.QUEUE_FULL)
                waiting.waiter.refused(QueueFull(refusal.message, retry_after_s=refusal.retry_after_s))
        for number in message.lost:
            if (waiting := self._waiting.get(number)) is not None:
                self._start(waiting)
        if message.again:
            self.offer_again()

    def _granted(self, grant: wire.Grant | wire.RemoteGrant) -> None:
        waiting = self._waiting.get(grant.number)
        if waiting is None:  # its client left while the grant was on its way; the place is given back
            self._withdraw(grant.number)
            return
        choice: Chosen | None
        if isinstance(grant, wire.RemoteGrant):
            choice = self._guests.enter(grant, time.monotonic())
        else:
            choice = self.claim(waiting.route, grant.slot, grant.generation)
        if choice is None:
            self._returned.append(grant.number)
        else:
            self._taken.append(grant.number)
            self._admit(waiting, choice, grant.home)
        self._flush_soon()

    def _ended_there(self, lease: wire.RemoteLease) -> None:
        self._held.pop(lease.lease, None)
        self._ended.append(lease)
        self._flush_soon()

    def _start(self, waiting: Waiting) -> bool:
        """Chooses anew for a request in line; False if it must go on waiting."""
        try:
            choice = self._choose(waiting.route, (), time.monotonic())
        except Saturated as saturated:
            waiting.home = saturated.home
            if self._is_alive():
                self._offers[waiting.number] = waiting
                self._flush_soon()
            return False
        except PenstockError as error:
            self._forget(waiting)
            self._offers.pop(waiting.number, None)
            waiting.waiter.refused(error)
        else:
            self._offers.pop(waiting.number, None)
            self._admit(waiting, choice, choice.lease.slot)
        return True

    def _admit(self, waiting: Waiting, choice: Chosen, home: int) -> None:
        self._forget(waiting)
        waited_s = (time.monotonic_ns() - waiting.since_ns) / 1e9
        self._counters.observe(Histogram.QUEUE_WAIT, waited_s)
        waiting.waiter.granted(choice, waited_s, self._url(home, choice))

    def _url(self, home: int, choice: Chosen) -> str:
        if home == choice.lease.slot:
            return choice.instance.url
        try:
            return self._table.instance(home).url
        except KeyError:
            return f"slot {home}"  # gone while the request waited

    # -- to the scheduler ----------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Behind what this turn of the loop still brings: one message for all of it."""
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        timeout_ns = int(self.timeout_s * 1e9)
        while self._has_news():
            offered = list(itertools.islice(self._offers.values(), PER_MESSAGE))
            message = wire.Tickets(
                *self._who,
                [waiting.ticket(timeout_ns) for waiting in offered],
                self._withdrawn[:PER_MESSAGE],
                self._taken[:PER_MESSAGE],
                self._returned[:PER_MESSAGE],
                self._freed,
                len(offered) == len(self._offers),
                list(itertools.islice(self._held.values(), PER_MESSAGE)),
                self._ended[:PER_MESSAGE],
            )
            if not self._send(message):
                break
            for waiting in offered:
                del self._offers[waiting.number]
            for lists in (self._withdrawn, self._taken, self._returned, self._ended):
                del lists[:PER_MESSAGE]
            for lease in message.held:
                del self._held[lease.lease]
            self._freed = self._announces = False
        if self._timer is None and (self._waiting or self._has_news()):
            self._timer = self.loop.call_later(TICK_S, self._tick)

    def _has_news(self) -> bool:
        lists = self._offers or self._withdrawn or self._taken or self._returned or self._held or self._ended
        return bool(lists) or self._freed or self._announces

    def _tick(self) -> None:
        self._timer = None
        if self._waiting and not self._is_alive():
            for waiting in list(itertools.islice(self._waiting.values(), ALONE)):
                self._start(waiting)
        self._flush()
