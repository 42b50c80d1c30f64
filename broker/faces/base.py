"""What a face is: everything in which `penstock serve` and `fd-router` differ, as rows of one table.

There is one program. Where it speaks (an answer, a log line) or where the two have different rules (what a
registration may look like, how often an instance is probed) it asks its face, and never which face it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from broker.config import Tree
from broker.errors import PenstockError
from broker.types import EngineKind


class Event(Enum):
    """What may be told in the log. A face has a line for it, or is silent."""

    # the process
    SERVING = auto()  # port
    CONFIG_DOUBT = auto()  # problem

    # a request, in its order; all have `context`
    UNREAD = auto()  # error
    PARSED = auto()
    CHOOSING_PREFILL = auto()  # now
    CHOOSING_DECODE = auto()  # now
    CHOSEN_PAIR = auto()  # now
    CHOSEN_MIXED = auto()  # url, count, tokens
    CHOSEN_PREFILL = auto()  # url, count, tokens
    CHOSEN_DECODE = auto()  # url, count, tokens
    WEIGHED = auto()  # url, loads, hits, now
    NOT_WEIGHED = auto()  # reason, loads, now
    SCORED = auto()  # url, hit, load, score
    NOT_CHOSEN = auto()  # error
    ATTEMPT_FAILED = auto()  # attempt, attempts, url, error
    BACKEND_FAILED = auto()  # url, error
    PREFILL_FAILED = auto()  # url, error
    DECODE_FAILED = auto()  # url, error
    UNREACHABLE = auto()  # error
    BROKEN = auto()  # error
    PREFILL_DONE = auto()  # url
    PREFILL_READ = auto()  # url
    PREFILL_ENDED = auto()  # url, stream
    PREFILL_DROPPED = auto()  # url
    RELEASED = auto()  # url, count
    TOKENS_RELEASED = auto()  # url, tokens
    COMPLETED = auto()
    ANSWERED = auto()  # method, path, status, duration, client
    PANIC = auto()  # error

    # the fleet
    REGISTERED = auto()  # url, engine, role, models
    NOT_REGISTERED = auto()  # error
    LISTED_REGISTERED = auto()  # index, url
    LISTED_NOT_REGISTERED = auto()  # index, url, path, error
    LISTED_NONE = auto()  # path
    LISTED_UNUSABLE = auto()  # index, problem, where
    LIST_UNREADABLE = auto()  # path, problem
    LIST_MALFORMED = auto()  # path, problem
    UNANSWERED = auto()  # url, error
    POLL_FAILED = auto()  # url
    HEALTH_CHANGED = auto()  # url, state
    REMOVED = auto()  # url, role
    CLEANED = auto()  # url, what
    PRESERVED = auto()  # url, what, unit, count
    CLEANED_ALL = auto()  # count, urls
    PRESERVED_ALL = auto()  # count, urls
    FLEET = auto()  # prefill, decode, mixed
    STATS = auto()  # running, workers, rate, hits, total
    ASKED_HEALTHY = auto()  # url
    ASKED_UNHEALTHY = auto()  # url


class Line(NamedTuple):
    level: int
    text: str
    """%-style, filled from the event's facts by name."""


class Said(NamedTuple):
    """An answer made of words: status, content type, body."""

    status: int
    kind: str
    body: bytes


class Misled(NamedTuple):
    """The answer to a request that leads nowhere."""

    said: Said
    location: str = ""
    """Where it leads after all."""


Estimate = tuple[str, int]
"""What a prompt's texts and token ids come to, for the choice of an instance: its text, and how many tokens. (Made for
every request: a named tuple takes ten times as long.)"""


@dataclass(frozen=True, kw_only=True)
class Face:
    """One way to speak, and the rules that go with it. Frozen; `broker.faces.FACES` has them all."""

    name: str

    # -- start ---------------------------------------------------------------------------------------------------

    settings: Callable[[Tree], tuple[Tree, list[str]]]
    """What a settings file means, as a tree for `broker.config`, and a sentence for each doubt."""
    needs_port: bool
    """There is no default port."""
    shows_banner: bool
    start_failure: Callable[[PenstockError], str]
    """The line on stderr when the start fails."""

    # -- registration and health ---------------------------------------------------------------------------------

    kind_unasked: EngineKind | None
    """What an instance is that does not say, and then serves every model; None = it is asked for both."""
    takes_comma_lists: bool
    """`POST /register` takes a string of words between commas for a list, as a register.yaml may always have it."""
    probes_at_once: bool
    """A health check asks again at once, up to the failure threshold, and the one that fails takes the instance out;
    else each check asks once, and failures in a row are counted."""
    polls_unread: bool
    """`/metrics` of engines are polled even if no policy in force reads what they say."""
    probes_members: bool
    """A member that registers again is probed."""
    registered: Said
    refused: Callable[[PenstockError], Said]
    """The answer to a registration that is not accepted."""
    reason: Callable[[PenstockError], str]
    """Why it is not, in a sentence."""

    # -- requests ------------------------------------------------------------------------------------------------

    relays_lines: bool
    """Streams are passed on line by line, each ended by a single newline; else byte for byte."""
    checks_body: bool
    """`model` and `stream` of a wrong type are refused; else they are the engine's business."""
    estimate: Callable[[list[str], int], Estimate]
    retries_answers: bool
    """An engine's answer that it cannot take the request (502, 503) moves the request on; else only silence does."""
    counts_lost: bool
    """A request that a kept connection lost counts as an attempt; else it is sent once more, uncounted."""
    guards_transfer: bool
    """Members by which engines are told where to fetch a prefill are refused in a client's body; else overwritten."""
    compares_sizes: bool
    """A pair must go together in tensor-parallel size; else any prefill and decode of one connector make one."""
    repeats_pairs: bool
    """A pair that failed is tried again where there is no other."""
    awaits_prefill_s: float
    """How long from the sending a decode's answer waits for prefill's status, where both are asked at once."""
    names_requests: bool
    """Every request has an `X-Request-Id`, towards the engine and the client."""
    queues: bool
    """Requests wait here for room when every candidate is saturated; else they wait inside the engines."""
    counts_unanswered: bool
    """A request that no engine answered counts among those of the instance it was sent to."""

    # -- answers -------------------------------------------------------------------------------------------------

    error: Callable[[PenstockError], Said]
    """A request's error."""
    panic: Said
    """When we fail in a way nobody foresaw."""
    json_kind: str
    """Content type of what the management routes answer."""
    paths: frozenset[str] | None
    """The only paths that exist; None = all there are."""
    answers_head: bool
    no_route: Callable[[str, str, Collection[str], bool], Misled]
    """What is said to (method, path) that lead nowhere. The methods are those that the path would have without its
    trailing slashes; whether the path itself exists, for other methods."""

    # -- log -----------------------------------------------------------------------------------------------------

    log_file: Path
    formatter: Callable[[str], logging.Formatter]
    """By the process's name."""
    lines: Mapping[Event, Line]
