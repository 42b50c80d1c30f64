"""`POST /v1/abort_requests`: whom a client means, and one answer out of many. Pure.

A client knows its request by the id it gave (`X-Request-Id`, FastDeploy's `request_id`) or by the one in its answer,
which engines make of the former: `chatcmpl-<id>`, `cmpl-<id>-0` (vLLM), `<id>_0` (FastDeploy). All of them mean it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from broker.errors import UNDECODABLE, BadRequest

MOST_IDS = 10_000
NEITHER = "must provide abort_all=true or req_ids"
"""FastDeploy's words."""

_CHILD = re.compile(r"(.+)_\d{1,4}")


class Aborted(msgspec.Struct, frozen=True):
    """A request that was ended, and how many tokens its client had got by then."""

    request_id: str
    output_token_count: int = 0


class Failure(msgspec.Struct, frozen=True):
    """Somebody who could not be asked."""

    server: str
    error: str


class EngineResult(msgspec.Struct):
    aborted: list[Aborted] = []


class _EngineAnswer(msgspec.Struct):
    result: EngineResult | None = None


class _Body(msgspec.Struct):
    req_ids: Any = None
    abort_all: Any = None


def wanted(body: bytes) -> list[str] | None:
    """The ids that a body asks to abort; None = every request. Raises `BadRequest`."""
    try:
        asked = msgspec.json.decode(body, type=_Body)
    except UNDECODABLE as e:
        raise BadRequest(f"the body must be a JSON object: {e}") from e
    if asked.abort_all is True:
        return None
    if not asked.req_ids:
        raise BadRequest(NEITHER)
    if not isinstance(asked.req_ids, list) or not all(isinstance(name, str) for name in asked.req_ids):
        raise BadRequest("'req_ids' must be a list of strings", param="req_ids")
    if len(asked.req_ids) > MOST_IDS:
        raise BadRequest(f"'req_ids' may list {MOST_IDS} ids, not {len(asked.req_ids)}", param="req_ids")
    return list(dict.fromkeys(asked.req_ids))


def names(ident: str) -> set[str]:
    """What a request may be called that was asked for, or reported, as `ident`."""
    found = {ident}
    for prefix in ("chatcmpl-", "cmpl-"):
        if ident.startswith(prefix):
            found.add(ident.removeprefix(prefix))
            if prefix == "cmpl-" and ident.endswith("-0"):
                found.add(ident.removeprefix(prefix).removesuffix("-0"))
    return found


def by_name(asked: Iterable[str]) -> dict[str, str]:
    """Every name of the ids asked for -> the id as it was asked for."""
    return {name: ident for ident in asked for name in names(ident)}


def read_result(body: bytes) -> list[Aborted]:
    """What a FastDeploy engine says that it aborted; later versions answer nothing."""
    try:
        result = msgspec.json.decode(body, type=_EngineAnswer).result
    except UNDECODABLE:
        return []
    return result.aborted if result is not None else []


def merged(
    asked: list[str] | None,
    ended: Iterable[Aborted],
    engines: Iterable[Aborted],
    failures: Iterable[Failure],
) -> Mapping[str, Any]:
    """FastDeploy's answer. `ended` by frontends, under the ids asked for; `engines` say what they themselves aborted,
    and counted the tokens better: the last word on an id is theirs. An id is not found if nobody had it."""
    ids = by_name(asked or ())
    found: dict[str, Aborted] = {entry.request_id: entry for entry in ended}
    for entry in engines:
        name = next((ids[name] for name in _engine_names(entry.request_id) if name in ids), entry.request_id)
        found[name] = Aborted(name, max(entry.output_token_count, found.get(name, entry).output_token_count))
    return {
        "request_id": f"control-{uuid.uuid4()}",
        "status": "success",
        "error_message": "Success",
        "result": {
            "aborted": list(found.values()),
            "not_found": [ident for ident in asked or () if ident not in found],
        },
        "errors": list(failures),
    }


def _engine_names(ident: str) -> set[str]:
    found = names(ident)
    return found | {match[1] for name in found if (match := _CHILD.fullmatch(name))}
