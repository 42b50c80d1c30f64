"""The samples of a run, and what can be asked of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.peers.measure import Sample


class Samples:
    """Noisy samples count only for a router that has no other of the case."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._idle = [s for s in samples if s["scenario"] == "idle"]
        self._cases: dict[tuple[str, str], dict[str, list[Sample]]] = {}
        for sample in samples:
            if sample["scenario"] != "idle":
                case = self._cases.setdefault((sample["mode"], sample["scenario"]), {})
                case.setdefault(sample["router"], []).append(_with_work(sample))
        for routers in self._cases.values():
            for name, taken in routers.items():
                routers[name] = [s for s in taken if not s["noisy"]] or taken

    def cases(self) -> list[tuple[str, str]]:
        """(mode, scenario) of which there are samples."""
        return list(self._cases)

    def routers(self, mode: str, scenario: str) -> list[str]:
        return list(self._cases.get((mode, scenario), {}))

    def of(self, mode: str, scenario: str, router: str) -> list[Sample]:
        return self._cases.get((mode, scenario), {}).get(router, [])

    def idle(self) -> list[Sample]:
        return self._idle

    def median(self, mode: str, scenario: str, router: str, key: str) -> float | None:
        values = [float(s[key]) for s in self.of(mode, scenario, router) if key in s]
        return statistics.median(values) if values else None

    def ratios(self, mode: str, scenario: str, ours: str, theirs: str, key: str) -> list[float]:
        """One per round in which both were measured: what disturbed a round disturbed both."""
        other = {s["round"]: float(s[key]) for s in self.of(mode, scenario, theirs) if s.get(key)}
        return [
            float(s[key]) / other[s["round"]]
            for s in self.of(mode, scenario, ours)
            if s.get(key) and s["round"] in other
        ]


def _with_work(sample: Sample) -> Sample:
    """Adds the one figure that every kind of load has: units of work per CPU second of the router."""
    if "cpu_us_per_event" in sample:
        return {**sample, "work_per_cpu_s": 1e6 / max(sample["cpu_us_per_event"], 1e-3)}
    if "requests_per_cpu_s" in sample:
        return {**sample, "work_per_cpu_s": sample["requests_per_cpu_s"]}
    return sample
