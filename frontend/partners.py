"""Which decode instances fit which prefill instances; kept until the fleet changes.

Instances are compared by their traits, of which a fleet has a handful, so a change among a thousand instances costs
milliseconds and a decision one look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from broker.candidates import Entry
from broker.engines.pd import Pairing, Traits, fits_together, traits
from broker.table import State
from broker.types import Connector, Role

Slots = frozenset[int]


class Fleet(Protocol):
    """What is needed of `broker.view.TableReader`."""

    selections: int

    def entries(self) -> list[Entry]: ...


class Partners:
    """Owned by whoever chooses pairs."""

    def __init__(self, fleet: Fleet, pairings: Mapping[Connector, Pairing]) -> None:
        self._fleet = fleet
        self._pairings = pairings
        self._selections = -1
        self._traits: dict[int, Traits] = {}
        self._unfit: dict[Traits, Slots] = {}
        self._lonely: Slots = frozenset()

    def lonely(self) -> Slots:
        """Prefill slots that no ready decode instance fits."""
        entries = self._fleet.entries()
        if self._fleet.selections != self._selections:
            self._selections = self._fleet.selections
            self._compare(entries)
        return self._lonely

    def unfit(self, prefill: int) -> Slots:
        """Decode slots that do not fit that prefill slot, as of the last `lonely`."""
        found = self._traits.get(prefill)
        return frozenset() if found is None else self._unfit[found]

    def strangers(self, decode: int) -> Slots:
        """Prefill slots that do not fit that decode slot, as of the last `lonely`."""
        apart = {kind for kind, slots in self._unfit.items() if decode in slots}
        return frozenset(slot for slot, kind in self._traits.items() if kind in apart and slot != decode)

    def _compare(self, entries: list[Entry]) -> None:
        kinds: dict[Role, dict[Traits, list[int]]] = {Role.PREFILL: {}, Role.DECODE: {}}
        self._traits = {}
        for entry in entries:
            if entry.state is State.READY and entry.instance.role in kinds:
                found = self._traits[entry.slot] = traits(entry.instance)
                kinds[entry.instance.role].setdefault(found, []).append(entry.slot)
        self._unfit = {}
        lonely: list[int] = []
        for prefill, slots in kinds[Role.PREFILL].items():
            fits = {decode: fits_together(prefill, decode, self._pairings) for decode in kinds[Role.DECODE]}
            self._unfit[prefill] = frozenset(
                slot for decode, others in kinds[Role.DECODE].items() if not fits[decode] for slot in others
            )
            if not any(fits.values()):
                lonely += slots
        self._lonely = frozenset(lonely)
