"""Prometheus metrics, read from shared memory: whichever frontend is asked shows the whole system.

Names follow FastDeploy's router where it has one, ours begin with `penstock_` and end with their unit. Counters do
not fall when a frontend dies (its row is settled and goes on), nor start with an earlier instance's numbers (what the
slot had counted before its generation is subtracted).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from broker.counters import (
    BOUNDS_S,
    STATUSES,
    CounterColumn,
    Histogram,
    TotalColumn,
    histogram_column,
)
from broker.counters import outcome as status_column
from broker.table import ClusterState, SchedulerEvent, State
from broker.types import Role
from broker.view import Entry, TableReader
from frontend import fleet
from frontend.pairings import Pairings
from shm.segment import Segment

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES = (
    ("in_flight_requests", "Requests that this host's frontends have at the instance", "in_flight"),
    ("in_flight_tokens", "Prompt tokens of those requests", "in_flight_tokens"),
    ("running_requests", "Requests the instance says it runs", "running"),
    ("waiting_requests", "Requests the instance says it queues", "waiting"),
    ("waiting_tokens", "Prompt tokens the instance says it queues", "waiting_tokens"),
    ("kv_use_ratio", "KV-cache use the instance reports", "kv_use"),
    ("capacity_requests", "Requests the instance runs at once", "capacity"),
    ("report_age_seconds", "Time since the instance reported its load", "report_age_s"),
)
_OUTCOMES = (
    ("retried", "Requests that failed before the first byte and were sent elsewhere", CounterColumn.RETRIED),
    ("broken", "Answers cut off by a failure after the first byte", CounterColumn.BROKEN),
    ("gone", "Requests whose client left", CounterColumn.GONE),
    ("rescued", "Requests taken back before the first byte, for an idle instance", CounterColumn.RESCUED),
    ("abandoned", "Requests in flight when their frontend died", CounterColumn.ABANDONED),
)
_CLASSES = (
    ("2xx", TotalColumn.RESPONSES_2XX),
    ("3xx", TotalColumn.RESPONSES_3XX),
    ("4xx", TotalColumn.RESPONSES_4XX),
    ("5xx", TotalColumn.RESPONSES_5XX),
)
_REFUSALS = (
    ("rejected", "Bad requests, nothing forwarded", TotalColumn.REJECTED),
    ("no_instance", "Requests for which no instance was ready", TotalColumn.NO_INSTANCE),
    ("model_not_found", "Requests for a model that nobody serves", TotalColumn.MODEL_NOT_FOUND),
    ("queued", "Requests that found every candidate saturated and stood in line", TotalColumn.QUEUED),
    ("queue_full", "Requests refused because too many stood in line", TotalColumn.QUEUE_FULL),
    ("queue_timeout", "Requests whose time was over before there was room", TotalColumn.QUEUE_TIMEOUT),
)

_QUEUE = (
    ("queue_tickets", "Requests in line that prefer the instance", GaugeMetricFamily, "tickets"),
    ("queue_tokens", "Prompt tokens of those requests that it has not cached", GaugeMetricFamily, "tokens"),
    ("queue_lent", "Places that requests of other hosts have, or are offered", GaugeMetricFamily, "lent"),
    ("queue_granted", "Requests from a line that the instance was granted", CounterMetricFamily, "granted"),
    ("queue_waited_seconds", "In line, of all those together", CounterMetricFamily, "wait_s"),
    ("queue_stolen", "Of those granted, taken from the line of another instance", CounterMetricFamily, "stolen"),
    ("queue_robbed", "Requests from the instance's line that another was granted", CounterMetricFamily, "robbed"),
    ("queue_returned", "Of those granted, back in line as it could not be taken", CounterMetricFamily, "returned"),
)
_CLUSTER = (
    ("offered", "Places that were offered to other hosts", SchedulerEvent.CLUSTER_OFFERED),
    ("lent", "Of those, accepted", SchedulerEvent.CLUSTER_LENT),
    (
        "returned",
        "Places that other hosts gave back, offers that they declined included",
        SchedulerEvent.CLUSTER_RETURNED,
    ),
    ("expired", "Places that came free because nobody renewed their lease", SchedulerEvent.CLUSTER_EXPIRED),
    ("accepted", "Requests that were granted an instance of another host", SchedulerEvent.CLUSTER_BORROWED),
    ("declined", "Places that other hosts offered and nobody needed any more", SchedulerEvent.CLUSTER_DECLINED),
    ("ignored_records", "Records in Redis that are foreign, or of another version", SchedulerEvent.CLUSTER_IGNORED),
    ("round_trips", "Questions to Redis", SchedulerEvent.CLUSTER_ROUND_TRIPS),
    ("lost", "Times that Redis went away, or forgot this host", SchedulerEvent.CLUSTER_LOST),
)
_SESSIONS = (
    (
        "router_cache_hit",
        "Cumulative number of cache hits (same session_id routed to same prefill worker)",
        TotalColumn.SESSION_REPEATS,
    ),
    (
        "router_cache_request",
        "Cumulative number of cache-aware scheduling requests with session_id",
        TotalColumn.SESSION_CHOICES,
    ),
)
"""FastDeploy's: not hits of any cache, but sessions that stayed where they were."""
_HISTOGRAMS = (
    ("time_to_first_byte_seconds", "From the request's whole body to the answer's first byte", Histogram.FIRST_TOKEN),
    ("request_duration_seconds", "From the request's whole body to the answer's end", Histogram.DURATION),
    ("queue_wait_seconds", "In line for room, of the requests that were granted it", Histogram.QUEUE_WAIT),
)
_WORKERS = {"mixed": 0, "prefill": 1, "decode": 2}
"""Place of the URL among FastDeploy's labels mixed_worker, prefill_worker, decode_worker."""


class Metrics:
    """A collector over the load table and the counters; reads only."""

    def __init__(self, table: TableReader, counters: Segment, pairings: Pairings | None = None) -> None:
        self._table = table
        self._pairings = pairings or Pairings()
        self._totals = counters.array("totals")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._last: dict[tuple[int, int], list[int]] = {}

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        entries = self._table.entries()
        yield from self._instances(entries)
        yield from self._outcomes(entries)
        yield from self._queue()
        yield from self._frontends()
        yield from self._scheduler()

    def _instances(self, entries: Sequence[Entry]) -> Iterator[Metric]:
        rows = fleet.rows(self._table, time.monotonic_ns())
        for name, text, field in _GAUGES:
            family = GaugeMetricFamily(f"penstock_instance_{name}", text, labels=("instance",))
            for row in rows:
                if (value := getattr(row, field)) is not None:
                    family.add_metric((row.url,), value)
            yield family
        states = GaugeMetricFamily(
            "penstock_instance_state", "1 for the state that the instance is in", labels=("instance", "role", "state")
        )
        for row in rows:
            for state in (State.READY, State.DRAINING, State.DOWN):
                word = state.name.lower()
                states.add_metric((row.url, row.role, word), float(word == row.state))
        yield states

    def _outcomes(self, entries: Sequence[Entry]) -> Iterator[Metric]:
        counted = [(entry, self._counted(entry)) for entry in entries]
        answers = CounterMetricFamily(
            "inference_requests",
            "Total number of inference requests",
            labels=("mixed_worker", "prefill_worker", "decode_worker", "status_code"),
        )
        statuses = [(str(status), status_column(status)) for status in STATUSES]
        for entry, cells in counted:
            workers = ["", "", ""]
            workers[_WORKERS[entry.instance.role.name.lower()]] = entry.instance.url
            for status, column in (*statuses, ("other", CounterColumn.STATUS_OTHER)):
                count = cells[column]
                if entry.instance.role is Role.DECODE and status.isdigit():
                    # Pairs that other frontends made are counted by decode alone.
                    pairs = self._pairings.of(entry.slot, entry.generation, int(status))
                    count -= sum(pairs.values())
                    for prefill, answered in pairs.items():
                        answers.add_metric(("", prefill, entry.instance.url, status), answered)
                if count > 0:
                    answers.add_metric((*workers, status), count)
        if answers.samples:  # as the original, which has no row before the first request
            yield answers
        requests = CounterMetricFamily(
            "penstock_instance_requests", "Requests sent to the instance, every attempt", labels=("instance",)
        )
        for entry, cells in counted:
            requests.add_metric((entry.instance.url,), cells[CounterColumn.STARTED])
        yield requests
        for name, text, column in _OUTCOMES:
            family = CounterMetricFamily(f"penstock_instance_{name}_requests", text, labels=("instance",))
            for entry, cells in counted:
                family.add_metric((entry.instance.url,), cells[column])
            yield family

    def _queue(self) -> Iterator[Metric]:
        rows = fleet.queue(self._table)
        for name, text, kind, field in _QUEUE:
            family = kind(f"penstock_{name}", text, labels=("instance",))
            for row in rows:
                family.add_metric((row.url,), getattr(row, field))
            yield family

    def _counted(self, entry: Entry) -> list[int]:
        """The instance's counters; the last ones seen while the scheduler is within its row, or stopped there."""
        key = entry.slot, entry.generation
        cells = self._table.counted(entry)
        if cells is None:
            return self._last.get(key, [0] * len(CounterColumn))
        self._last = {k: v for k, v in self._last.items() if k[0] != entry.slot}
        self._last[key] = cells
        return cells

    def _frontends(self) -> Iterator[Metric]:
        totals = self._table.counters.totals().tolist()
        classes = CounterMetricFamily("penstock_responses", "Answers to inference requests", labels=("class",))
        for word, column in _CLASSES:
            classes.add_metric((word,), totals[column])
        yield classes
        for name, text, column in _REFUSALS:
            yield CounterMetricFamily(f"penstock_{name}_requests", text, value=totals[column])
        for name, text, column in _SESSIONS:
            yield CounterMetricFamily(name, text, value=totals[column])
        yield CounterMetricFamily(
            "penstock_engine_frames_dropped",
            "Messages of native engines that were not used: malformed, or of another life",
            value=totals[TotalColumn.FRAMES_DROPPED],
        )
        yield CounterMetricFamily(
            "penstock_prefix_notices_lost",
            "Prompts that other frontends were not told of, because the scheduler took no more",
            value=totals[TotalColumn.NOTICES_LOST],
        )
        for name, text, histogram in _HISTOGRAMS:
            yield _histogram(f"penstock_{name}", text, totals, histogram)
        connections = GaugeMetricFamily("penstock_open_connections", "Clients' connections", labels=("frontend",))
        streams = GaugeMetricFamily("penstock_open_requests", "Requests under way", labels=("frontend",))
        live = self._table.counters.live()
        for index, _ in live:
            own: list[int] = self._totals[index].tolist()
            opened = own[TotalColumn.CONNECTIONS_OPENED] - own[TotalColumn.CONNECTIONS_CLOSED]
            connections.add_metric((str(index),), opened)
            streams.add_metric((str(index),), own[TotalColumn.STREAMS_OPENED] - own[TotalColumn.STREAMS_CLOSED])
        yield connections
        yield streams
        yield GaugeMetricFamily("penstock_frontends", "Frontends alive", value=len(live))

    def _scheduler(self) -> Iterator[Metric]:
        alive = self._table.alive(time.monotonic_ns())
        yield GaugeMetricFamily("penstock_scheduler_alive", "1 while the scheduler gives signs of life", value=alive)
        yield GaugeMetricFamily("penstock_scheduler_epoch", "The scheduler's life", value=self._table.epoch)
        events = CounterMetricFamily(
            "penstock_scheduler_events", "What the scheduler counted of itself", labels=["event"]
        )
        counted = self._table.events()
        for event, count in counted.items():
            events.add_metric((event.name.lower(),), count)
        yield events
        state, hosts = self._table.cluster
        if state is not ClusterState.OFF:
            yield GaugeMetricFamily(
                "penstock_cluster_joined",
                "1 while this host is a member of its cluster",
                value=state is ClusterState.JOINED,
            )
            yield GaugeMetricFamily("penstock_cluster_hosts", "Members, this host included; 0 = alone", value=hosts)
            for name, text, event in _CLUSTER:
                yield CounterMetricFamily(f"penstock_cluster_{name}", text, value=counted[event])


def _histogram(name: str, text: str, totals: Sequence[int], histogram: Histogram) -> HistogramMetricFamily:
    first = histogram_column(histogram)
    buckets: list[tuple[str, float]] = []
    below = 0
    for place, bound in enumerate((*map(str, BOUNDS_S), "+Inf")):
        below += totals[first + place]
        buckets.append((bound, below))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, sum_value=totals[first + len(buckets)] / 1e6)
    return family
