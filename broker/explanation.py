"""`penstock explain`: the answer of `GET /explain/ID` (`frontend.explain`) in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from broker.listing import listing

Json = dict[str, Any]

COLUMNS = ("in_flight", "tokens", "running", "waiting", "report_age_ms", "blocks", "score")
"""Of the candidates; those that no candidate has a value in are left out, as the choice did not look at them."""
_INDENT = " " * 14


def told(answer: Json) -> Iterator[str]:
    """Lines, for all the requests in it."""
    for number, request in enumerate(answer["requests"]):
        if number:
            yield ""
        yield from _request(request)
    if silent := answer["silent_frontends"]:
        yield f"({silent} frontends could not be asked)"


def _request(request: Json) -> Iterator[str]:
    other = f" ({request['request_id']})" if request["request_id"] else ""
    model = f", model {request['model']}" if request["model"] is not None else ""
    yield (
        f"request {request['id']}{other}: {request['path']}{model}; "
        f"frontend {request['frontend']}, {request['began_s_ago']:.1f} s ago"
    )
    yield f"  {request['outcome']}, {_facts(request)}"
    for step in request["steps"]:
        said, *more = _step(step)
        yield f"  {step['at_ms']:+8.1f} ms  {said}"
        yield from (_INDENT + line for line in more)


def _facts(request: Json) -> str:
    facts = [
        f"status {request['status'] or '-'}",
        f"at {request['instance']}" if request["instance"] else "at no instance",
        f"first byte after {_ms(request['first_byte_ms'])}" if request["first_byte_ms"] is not None else "no byte yet",
        f"{_ms(request['duration_ms'])} in all",
        f"{request['tries']} {'try' if request['tries'] == 1 else 'tries'}",
    ]
    if request["queue_ms"] is not None:
        facts.append(f"{_ms(request['queue_ms'])} in line")
    facts += [f"{word} from {request[key]}" for word in ("stolen", "rescued") if request[key := f"{word}_from"]]
    return ", ".join(facts)


def _step(step: Json) -> Iterator[str]:
    match step["step"]:
        case "sent" if "legs" in step:
            yield f"sent to {len(step['legs'])} instances at once"
            for leg in step["legs"]:
                yield f"{leg.get('role', 'leg')}: {_choice(leg['instance'], leg)}"
                yield from _candidates(leg)
        case "sent":
            yield f"sent to {_choice(step['instance'], step)}"
            yield from _candidates(step)
        case "queued":
            yield f"no candidate had room; in line for {_choice(step['home'], step)}"
            yield from _candidates(step)
        case "granted":
            yield f"granted, from the line of {step['home']}"
        case "rescued":
            yield f"taken back from {step['from']}, in which it waited, for an instance with nothing to do"
        case _:
            yield f"failed at {step['instance']}: {step['reason']}"


def _choice(url: str, step: Json) -> str:
    if "candidates" not in step:
        return url
    blocks = f", for a prompt of {step['blocks']} blocks" if step["blocks"] is not None else ""
    reason = f" ({step['reason']})" if step["reason"] else ""
    return f"{url}: the choice of {step['policy']} among {step['candidates']}{blocks}{reason}"


def _candidates(step: Json) -> Iterator[str]:
    rows: list[Json] = step.get("nearest", [])
    columns = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    if columns:
        marked = [{**row, "instance": ("* " if row["chosen"] else "  ") + row["instance"]} for row in rows]
        yield from listing(marked, ["instance", *columns])
    if rows and (more := step["candidates"] - len(rows)):
        yield f"and {more} more"
    if left_out := step.get("left_out"):
        yield f"left out: {', '.join(left_out)}"


def _ms(value: float) -> str:
    return f"{value:.1f} ms"
