"""FastDeploy's Go router, as its clients, engines, operators and their scripts know it.

Where the original is defective the meaning is ours and only the words are its: docs/fd-router.md lists both.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from pathlib import Path

from broker.errors import (
    BadRegistration,
    BadRequest,
    ConfigError,
    ConfigMalformed,
    ConfigUnreadable,
    Fault,
    NoInstance,
    PenstockError,
    PortMissing,
    Unhealthy,
    Unread,
    UpstreamError,
)
from broker.faces import fd_settings, go
from broker.faces.base import Estimate, Event, Face, Line, Misled, Said
from broker.types import EngineKind

JSON = "application/json; charset=utf-8"
TOKENS_PER_CHARACTER = 2
"""The original's estimate for text. One token id stands for about four characters of it."""
TOKENS_PER_ID = 8
AWAITS_PREFILL_S = 2.0
"""The original waits for both legs' headers without end; some engines' prefill never sends any."""


# -- start -----------------------------------------------------------------------------------------------------

START_FAILURES: dict[type[PenstockError], str] = {
    PortMissing: "Failed to load config: failed to set router listen port",
    ConfigUnreadable: "Failed to load config: failed to read config file: {}",
    ConfigMalformed: "Failed to load config: failed to parse config: {}",
    ConfigError: "Failed to load config: {}",
    PenstockError: "Failed to start server: {}",
}


def start_failure(failure: PenstockError) -> str:
    text = START_FAILURES[_listed(failure, START_FAILURES)]
    return f"{time.strftime('%Y/%m/%d %H:%M:%S')} {text.format(failure.message)}"


def _listed(failure: PenstockError, table: Collection[type[PenstockError]]) -> type[PenstockError]:
    """The nearest of the failure's classes that the table lists."""
    return next(kind for kind in type(failure).__mro__ if kind in table)


# -- requests --------------------------------------------------------------------------------------------------


def estimate(texts: list[str], ids: int) -> Estimate:
    """Pieces trimmed, the empty ones dropped, the others joined by one space."""
    text = " ".join(filter(None, map(str.strip, texts)))
    return text, TOKENS_PER_CHARACTER * len(text) + TOKENS_PER_ID * ids


ERRORS: dict[type[PenstockError], tuple[int | None, str]] = {
    BadRequest: (400, "Invalid JSON format: {}"),
    Unread: (None, "Invalid request body: {}"),
    NoInstance: (502, "Failed to select worker: no healthy workers available"),
    UpstreamError: (None, "Failed to connect to backend service: {}"),
    PenstockError: (None, "{}"),
}
"""Status and text of a request's error. None = its own status."""
PAIR_ERRORS: dict[type[PenstockError], tuple[int | None, str]] = {
    NoInstance: (503, "No available prefill/decode workers"),
}
"""Where those of pairs differ."""


def error(failure: PenstockError) -> Said:
    kind = _listed(failure, ERRORS)
    status, text = ERRORS[kind] if failure.request_id is None else PAIR_ERRORS.get(kind, ERRORS[kind])
    body = b'{"error": ' + go.dumps(text.format(failure.message))
    if failure.request_id is not None:
        body += b', "request_id": ' + go.dumps(failure.request_id)
    return Said(status or failure.status, JSON, body + b"}")


def no_route(method: str, path: str, methods: Collection[str], exists: bool) -> Misled:
    target = path.removesuffix("/")
    if exists or target == path or method not in methods:
        return Misled(Said(404, "text/plain", b"404 page not found"))
    if method == "GET":
        link = f'<a href="{target}">Moved Permanently</a>.\n\n'
        return Misled(Said(301, "text/html; charset=utf-8", link.encode()), target)
    return Misled(Said(307, "", b""), target)


# -- registration ----------------------------------------------------------------------------------------------


def refused(failure: PenstockError) -> Said:
    status = 400 if isinstance(failure, BadRequest) else failure.status
    return Said(status, JSON, go.dumps({"code": status, "msg": reason(failure)}))


def reason(failure: PenstockError) -> str:
    if isinstance(failure, Unhealthy):
        return f"{failure.url} service is not healthy"
    if not isinstance(failure, BadRegistration):
        return failure.message
    match failure.fault:
        case Fault.MALFORMED:
            return f"Invalid InstanceInfo JSON format: {failure.detail}"
        case Fault.MISSING:
            return f"invalid InstanceInfo format:{failure.param} is required"
        case Fault.UNFIT:
            return failure.detail
        case _:
            return f"invalid InstanceInfo format:{failure.detail}"


# -- log -------------------------------------------------------------------------------------------------------


_LEVELS = {"WARNING": "WARN", "CRITICAL": "ERROR"}
_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


class GoFormatter(logging.Formatter):
    """`[LEVEL] YYYY/MM/DD HH:MM:SS logger.go:<n>: <message>`, one line whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        when = self.formatTime(record, "%Y/%m/%d %H:%M:%S")
        text = record.getMessage()
        if record.exc_info:
            text += ": " + self.formatException(record.exc_info)
        return f"[{level}] {when} logger.go:{record.lineno}: {_BREAKS.sub(' | ', text)}"


def formatter(process: str) -> logging.Formatter:
    return GoFormatter()


_INFO, _ERROR = logging.INFO, logging.ERROR

LINES = {
    Event.SERVING: Line(_INFO, "Starting server on :%(port)s"),
    Event.CONFIG_DOUBT: Line(logging.WARNING, "%(problem)s"),
    Event.UNREAD: Line(_ERROR, "%(context)sFailed to unmarshal request JSON: %(error)s"),
    Event.PARSED: Line(_INFO, "%(context)sParsing completed; starting worker selection."),
    Event.CHOOSING_PREFILL: Line(_INFO, "%(context)sbefore SelectWorker prefill. ts_ms=%(now)s"),
    Event.CHOOSING_DECODE: Line(_INFO, "%(context)sbefore SelectWorker decode, after prefill. ts_ms=%(now)s"),
    Event.CHOSEN_PAIR: Line(_INFO, "%(context)safter SelectWorker decode, before return. ts_ms=%(now)s"),
    Event.CHOSEN_MIXED: Line(_INFO, "%(context)sselect worker (mixed): %(url)s, count: %(count)d"),
    Event.CHOSEN_PREFILL: Line(_INFO, "%(context)sselect worker (prefill): %(url)s, tokens: %(tokens)d"),
    Event.CHOSEN_DECODE: Line(_INFO, "%(context)sselect worker (decode): %(url)s, count: %(count)d"),
    Event.WEIGHED: Line(
        _INFO,
        "%(context)scache-aware prefill: final strategy: cache_aware_scoring, selected=%(url)s, loads=%(loads)s, "
        "hitRatios=%(hits)s. ts_ms=%(now)s",
    ),
    Event.NOT_WEIGHED: Line(
        _INFO,
        "%(context)scache-aware prefill: final strategy: process_tokens, reason: %(reason)s%(loads)s. ts_ms=%(now)s",
    ),
    Event.SCORED: Line(
        logging.DEBUG,
        "%(context)scache-aware score: worker=%(url)s hit=%(hit).1f loadRatio=%(load).3f score=%(score).3f",
    ),
    Event.NOT_CHOSEN: Line(_ERROR, "%(context)sFailed to select %(what)s: %(error)s"),
    Event.ATTEMPT_FAILED: Line(_ERROR, "%(context)sRequest failed (attempt %(attempt)d/%(attempts)d): %(error)s"),
    Event.BACKEND_FAILED: Line(_ERROR, "%(context)sBackend request failed for %(url)s: %(error)s"),
    Event.PREFILL_FAILED: Line(_ERROR, "%(context)sPrefill request failed for %(url)s: %(error)s"),
    Event.DECODE_FAILED: Line(_ERROR, "%(context)sDecode request failed for %(url)s: %(error)s"),
    Event.UNREACHABLE: Line(_ERROR, "%(context)sFailed to connect to backend service: %(error)s"),
    Event.BROKEN: Line(_ERROR, "%(context)sscanner error: %(error)s"),
    Event.PREFILL_DONE: Line(_INFO, "%(context)s[prefill] first chunk received, release counter url=%(url)s"),
    Event.PREFILL_READ: Line(
        _INFO, "%(context)s[prefill] non-stream prefill response done, release counter url=%(url)s"
    ),
    Event.PREFILL_ENDED: Line(
        _INFO, "%(context)s[prefill] release in defer (fallback) url=%(url)s, isStream=%(stream)s"
    ),
    Event.PREFILL_DROPPED: Line(
        _INFO, "%(context)s[prefill] release in CommonCompletions defer (error path) url=%(url)s"
    ),
    Event.RELEASED: Line(_INFO, "%(context)srelease worker: %(url)s, count: %(count)d"),
    Event.TOKENS_RELEASED: Line(_INFO, "%(context)srelease prefill tokens: %(url)s, tokens: %(tokens)d"),
    Event.COMPLETED: Line(_INFO, "%(context)sRequest completed successfully."),
    Event.ANSWERED: Line(_INFO, "%(context)s[%(method)s] %(path)s HTTP/1.1 %(status)d %(duration)s %(client)s"),
    Event.PANIC: Line(_ERROR, "Panic recovered: %(error)s"),
    Event.NOT_REGISTERED: Line(_ERROR, "Failed to register instance: %(error)s"),
    Event.LISTED_REGISTERED: Line(_INFO, "Successfully registered instance from index %(index)d"),
    Event.LISTED_NOT_REGISTERED: Line(_ERROR, "Failed to register instance from index %(index)d: %(error)s"),
    Event.LISTED_UNUSABLE: Line(_ERROR, "Failed to register instance from index %(index)d: %(problem)s"),
    Event.LIST_UNREADABLE: Line(_ERROR, "Failed to read YAML file %(path)s: %(problem)s"),
    Event.LIST_MALFORMED: Line(_ERROR, "Failed to unmarshal YAML file %(path)s: %(problem)s"),
    Event.LISTED_NONE: Line(_INFO, "No instances found in config file %(path)s"),
    Event.UNANSWERED: Line(_ERROR, "failed to send request to %(url)s with error: %(error)s"),
    Event.POLL_FAILED: Line(
        logging.WARNING, "GetRemoteMetrics failed for %(url)s, falling back to local counter: no usable answer"
    ),
    Event.REMOVED: Line(_ERROR, "Removed unhealthy %(role)s instance: %(url)s"),
    Event.CLEANED: Line(_INFO, "cleanup unhealthy worker %(what)s: %(url)s"),
    Event.PRESERVED: Line(
        _INFO, "unhealthy worker %(what)s preserved (inflight requests): %(url)s, %(unit)s: %(count)d"
    ),
    Event.CLEANED_ALL: Line(_INFO, "removed counters for %(count)d unhealthy workers: %(urls)s"),
    Event.PRESERVED_ALL: Line(_INFO, "preserved counters for %(count)d workers with inflight requests: %(urls)s"),
    Event.FLEET: Line(logging.DEBUG, "Healthy instances: prefill=%(prefill)s, decode=%(decode)s, mixed=%(mixed)s"),
    Event.STATS: Line(
        _INFO,
        "[stats] total_running=%(running)d, workers: %(workers)s, "
        "cache_hit_rate=%(rate).2f%% (hits=%(hits)d/total=%(total)d)",
    ),
    Event.ASKED_HEALTHY: Line(_INFO, "Server %(url)s is healthy"),
    Event.ASKED_UNHEALTHY: Line(logging.WARNING, "Server %(url)s is not healthy"),
}

FD_ROUTER = Face(
    name="fd-router",
    settings=fd_settings.read,
    needs_port=True,
    shows_banner=False,
    start_failure=start_failure,
    kind_unasked=EngineKind.FASTDEPLOY,
    takes_comma_lists=False,
    probes_at_once=True,
    polls_unread=False,
    probes_members=True,
    registered=Said(200, JSON, b'{"code":200,"msg":"Register success"}'),
    refused=refused,
    reason=reason,
    relays_lines=True,
    checks_body=False,
    counts_lost=True,
    guards_transfer=False,
    compares_sizes=False,
    estimate=estimate,
    retries_answers=False,
    repeats_pairs=False,
    awaits_prefill_s=AWAITS_PREFILL_S,
    names_requests=False,
    queues=False,
    counts_unanswered=False,
    error=error,
    panic=Said(500, JSON, b'{"code":500,"msg":"Internal server error"}'),
    json_kind=JSON,
    paths=frozenset(
        (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/abort_requests",
            "/register",
            "/registered",
            "/registered_number",
            "/health_generate",
            "/decode_instances",
            "/metrics",
            # Ours, for `penstock instances`, `penstock drain` and native engines.
            "/instances",
            "/drain",
            "/endpoints",
        )
    ),
    answers_head=False,
    no_route=no_route,
    log_file=Path("logs/router.log"),
    formatter=formatter,
    lines=LINES,
)
