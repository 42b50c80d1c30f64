"""Which instances this frontend had better not try for a moment.

    closed --[n failures in a row]--> open --[secs later]--> one request tries --[first byte]--> on trial
       ^                               ^                              |                          |    |
       |                               +----------[failure]-----------+-------[failure]----------+    |
       +-------------------------------------------[a whole answer]-----------------------------------+

Failures are counted by slot and generation: an instance that gets the slot of another begins without blame. (It may
be avoided for the rest of `secs`, which is shorter than a slot rests.)

Pure: time comes in as `now` (monotonic seconds). Every frontend has its own; the fleet-wide word on an instance is
its state in the load table.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Trouble:
    __slots__ = ("failures", "generation", "until")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.failures = 0
        self.until = 0.0


class Breaker:
    """Failures in a row, by instance. Instances without any cost nothing."""

    def __init__(self, failures: int, secs: float) -> None:
        """An instance is open for `secs` once it has failed `failures` times in a row."""
        self._limit = failures
        self._secs = secs
        self.suspects: dict[int, _Trouble] = {}
        """By slot: those that have failed lately. Where there are none, there is nothing else to ask here."""

    def __repr__(self) -> str:
        return f"Breaker({ {slot: t.failures for slot, t in self.suspects.items()} })"

    def failures(self, slot: int) -> int:
        """In a row, up to now."""
        trouble = self.suspects.get(slot)
        return trouble.failures if trouble is not None else 0

    def open_slots(self, now: float) -> list[int]:
        """Slots not to be tried now."""
        if not self.suspects:
            return []
        return [slot for slot, t in self.suspects.items() if t.failures >= self._limit and now < t.until]

    def least_bad(self, slots: Iterable[int]) -> int:
        """Of slots that are all open, the one with the fewest failures, then the one that opens no more first."""
        return min(slots, key=lambda slot: (self.suspects[slot].failures, self.suspects[slot].until))

    def tries(self, slot: int, now: float) -> None:
        """A request was sent to `slot`. If its time of rest was over, this one request is the trial: the others go
        on avoiding it for as long again, or until the trial has succeeded."""
        trouble = self.suspects.get(slot)
        if trouble is not None and trouble.failures >= self._limit and now >= trouble.until:
            trouble.until = now + self._secs

    def failed(self, slot: int, generation: int, now: float) -> None:
        trouble = self.suspects.get(slot)
        if trouble is None or trouble.generation != generation:
            trouble = self.suspects[slot] = _Trouble(generation)
        trouble.failures += 1
        if trouble.failures >= self._limit:
            trouble.until = now + self._secs

    def answers(self, slot: int) -> None:
        """The first byte of an answer: the instance may be tried again, but only a whole answer clears it. (One that
        always dies in mid-stream would otherwise never be open.)"""
        trouble = self.suspects.get(slot)
        if trouble is not None:
            trouble.failures = min(trouble.failures, self._limit - 1)

    def succeeded(self, slot: int) -> None:
        """An answer was whole."""
        if self.suspects:
            self.suspects.pop(slot, None)
