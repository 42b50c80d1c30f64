"""Our own face: OpenAI's errors, strict settings, one log line per request."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import msgspec

from broker.errors import PenstockError
from broker.faces.base import Event, Face, Line, Misled, Said
from broker.faces.estimate import estimate

JSON = "application/json"


def error(failure: PenstockError) -> Said:
    """OpenAI's form."""
    return Said(failure.status, JSON, msgspec.json.encode({"error": _fields(failure)}))


def refused(failure: PenstockError) -> Said:
    """FastDeploy's form, `code` and `msg`, and OpenAI's in one body."""
    fields = {"code": failure.status, "msg": failure.message, "error": _fields(failure)}
    return Said(failure.status, JSON, msgspec.json.encode(fields))


def no_route(method: str, path: str, methods: Collection[str], exists: bool) -> Misled:
    """A path is what it is: no redirects for slashes, which would send clients their bodies again."""
    if exists:
        return Misled(error(MethodNotAllowed(f"{method} is not allowed for {path}")))
    return Misled(error(NotFound(f"there is nothing at {path}")))


class NotFound(PenstockError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(PenstockError):
    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


def _fields(failure: PenstockError) -> dict[str, str | None]:
    message = failure.public or failure.message
    return {"message": message, "type": failure.kind, "param": failure.param, "code": failure.code}


def formatter(process: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")


PENSTOCK = Face(
    name="penstock",
    settings=lambda tree: (tree, []),
    needs_port=False,
    shows_banner=True,
    start_failure=lambda failure: f"penstock: {failure.message}",
    kind_unasked=None,
    takes_comma_lists=True,
    probes_at_once=False,
    polls_unread=True,
    probes_members=False,
    registered=Said(200, JSON, b'{"code":200,"msg":"Register success"}'),
    refused=refused,
    reason=lambda failure: failure.message,
    relays_lines=False,
    checks_body=True,
    counts_lost=False,
    guards_transfer=True,
    compares_sizes=True,
    estimate=estimate,
    retries_answers=True,
    repeats_pairs=True,
    awaits_prefill_s=0.0,  # what decode says it has from prefill
    names_requests=True,
    queues=True,
    counts_unanswered=True,
    error=error,
    panic=error(PenstockError("internal error")),
    json_kind=JSON,
    paths=None,
    answers_head=True,
    no_route=no_route,
    log_file=Path("logs/penstock.log"),
    formatter=formatter,
    lines={
        Event.REGISTERED: Line(logging.INFO, "registered %(url)s: %(engine)s %(role)s, models: %(models)s"),
        Event.LISTED_NOT_REGISTERED: Line(logging.ERROR, "%(url)s of %(path)s is not registered yet: %(error)s"),
        Event.LISTED_UNUSABLE: Line(logging.ERROR, "%(where)s: %(problem)s"),
        Event.LIST_UNREADABLE: Line(logging.ERROR, "%(path)s cannot be read: %(problem)s"),
        Event.LIST_MALFORMED: Line(logging.ERROR, "%(path)s cannot be used: %(problem)s"),
        Event.ASKED_HEALTHY: Line(logging.INFO, "%(url)s is healthy"),
        Event.ASKED_UNHEALTHY: Line(logging.WARNING, "%(url)s is not healthy"),
        Event.UNANSWERED: Line(logging.DEBUG, "no answer from %(url)s: %(error)s"),
        Event.HEALTH_CHANGED: Line(logging.WARNING, "%(url)s is %(state)s"),
        Event.REMOVED: Line(logging.WARNING, "%(url)s is forgotten"),
    },
)
