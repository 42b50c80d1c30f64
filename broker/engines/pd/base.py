"""Prefill/decode pairs: what is sent to each half, and which instances make a pair. Pure.

A *pairing* is one connector's way. For each request and pair it makes a `Plan`:

    concurrent     prefill leg ---+        both are known at once; decode's answer is the client's
                   decode leg  ---+
    sequential     prefill leg --> its answer --> decode leg

Bodies are edited, never encoded again: integers above 2^53, formatting and unknown members reach the engines as the
client wrote them. What the engines must tell each other (RDMA ports, device ids, block ids) comes from their
registrations or from prefill's answer and is passed on unread.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from broker.errors import BadRequest, UpstreamBroken
from broker.splice import edit_members, members
from broker.types import Connector, Instance, PairFields

TRANSFER_KEYS = (
    "disaggregate_info",
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "disagg_prefill_dp_rank",
)
"""Members by which an engine is told where to fetch what: the router's to write, not the client's."""

BOOTSTRAP_PORT = 8998

Headers = list[tuple[bytes, bytes]]
Changes = dict[str, bytes | None]
"""For `splice.edit_members`."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request, as far as plans look at it."""

    body: bytes
    request_id: str
    """FastDeploy's name for it: the client's own, or one made by the router."""


class Leg(msgspec.Struct, frozen=True, kw_only=True):
    """What one half is sent."""

    body: bytes
    headers: Mapping[bytes, bytes] = {}
    """Added to the client's headers, or in place of those of the same name (lower case)."""
    transfer: bytes = b""
    """The peer's opaque metadata, for native engines."""
    stream: bool | None = None
    """Whether the answer is one; None = as the client asked."""

    def headers_of(self, client: Headers) -> Headers:
        """The client's headers and its own."""
        if not self.headers:
            return client
        return [header for header in client if header[0] not in self.headers] + list(self.headers.items())


class Plan(msgspec.Struct, frozen=True):
    """One request at one pair."""

    prefill: Leg
    decode: Callable[[bytes], Leg]
    """Decode's leg from prefill's whole answer; a concurrent plan gives it none. Raises `UpstreamBroken` when the
    answer lacks what decode needs."""


class Traits(msgspec.Struct, frozen=True):
    """What decides whether two instances fit each other: few different ones in any fleet."""

    connector: Connector
    tp: int
    """Tensor-parallel size; 0 = not known."""
    models: tuple[str, ...]


class Pairing(Protocol):
    """One connector's way."""

    sequential: bool
    """Prefill answers before decode is asked."""
    retried: frozenset[int]
    """Statuses of a half that say "not this pair", before the first byte."""
    gives_back: bool
    """Decode may stop a request in the middle for want of room (`given_back`): its unstreamed answers are looked at."""

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        """Whether tensor-parallel sizes go together; connector and models are compared by `fits_together`."""

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        """Raises `BadRequest` for what the connector cannot carry, and `UpstreamError` if the pair cannot be used."""


RETRIED = frozenset((502, 503))
"""What any half may answer that cannot take a request now."""

MOST_ID = 1024
"""Characters of a request's name, which is kept with what is remembered of it."""


def request_id(body: bytes, *, refuse: bool) -> str:
    """The request's name: the client's `request_id`, or a new one. Checks what holds for every connector.

    Raises `BadRequest`: no object of single members, a `request_id` that is no string, and with `refuse` any of
    `TRANSFER_KEYS` (otherwise they are overwritten).
    """
    found = members(body)
    if refuse:
        for key in TRANSFER_KEYS:
            if key in found and body[slice(*found[key])] != b"null":
                raise BadRequest(f"{key!r} is the router's to set", param=key)
    if "request_id" in found:
        value = msgspec.json.decode(body[slice(*found["request_id"])])
        if isinstance(value, str):
            if len(value) > MOST_ID:
                raise BadRequest(f"'request_id' is longer than {MOST_ID} characters", param="request_id")
            return value
        if value is not None:
            raise BadRequest("'request_id' must be a string", param="request_id")
    return str(uuid.uuid4())


def host_of(instance: Instance) -> str:
    """IPv6 without brackets, as it was registered."""
    return urlsplit(instance.url).hostname or ""


def bracketed(host: str) -> str:
    """As it stands before a port."""
    return f"[{host}]" if ":" in host else host


def pair_fields(instance: Instance) -> PairFields:
    return instance.pair or PairFields()


def encode(value: object) -> bytes:
    return msgspec.json.encode(value)


# -- batches -----------------------------------------------------------------------------------------------


class _Batch(msgspec.Struct):
    prompt: Any = None
    n: Any = None


def batch_size(body: bytes) -> int | None:
    """How many sequences the body asks for: the prompts of a list, or `n`; None = a single one."""
    if b'"n"' not in body and b'"prompt"' not in body and b"\\u" not in body:
        return None  # a chat of one answer, the usual case, is not decoded again
    asked = msgspec.json.decode(body, type=_Batch)
    if isinstance(asked.prompt, list) and asked.prompt and isinstance(asked.prompt[0], str | list):
        return len(asked.prompt)
    return asked.n if type(asked.n) is int and asked.n > 1 else None


def single(body: bytes) -> None:
    """Raises `BadRequest` for a batch, where one transfer carries one sequence.

    vLLM answers a batch with the parameters of its first prompt only, and frees the blocks with the first of several
    fetches: the others would be decoded from foreign blocks, and nobody would be told.
    """
    size = batch_size(body)
    if size is not None and size > 1:
        raise BadRequest(
            f"prefill/decode pairs of this engine take one prompt with one answer, not {size}; send them one by one",
        )


# -- what vLLM's connectors have in common -----------------------------------------------------------------


def first_token_only(body: bytes, more: Changes | None = None) -> bytes:
    """The body as prefill gets it: one token, not as a stream. (A streamed one gives no parameters in vLLM 0.32.)"""
    found = members(body)
    changes: Changes = {"stream": b"false", "stream_options": None, "min_tokens": None, "max_tokens": b"1"}
    if "max_completion_tokens" in found:
        changes["max_completion_tokens"] = b"1"
    return edit_members(body, changes | (more or {}))


def answered_member(answer: bytes, name: str) -> bytes:
    """The bytes of an object that prefill answered. Raises `UpstreamBroken` when there is none."""
    try:
        found = members(answer).get(name)
    except BadRequest as e:
        raise UpstreamBroken(f"prefill's answer cannot be used: {e.message}") from e
    value = answer[slice(*found)] if found else b""
    if not value.startswith(b"{"):
        raise UpstreamBroken(f"prefill answered no {name}; is its connector configured?")
    return value


def divides(prefill: Traits, decode: Traits) -> bool:
    """Tensor-parallel sizes of which one is a multiple of the other; unknown ones are taken to fit."""
    return not prefill.tp or not decode.tp or max(prefill.tp, decode.tp) % min(prefill.tp, decode.tp) == 0


def equal(prefill: Traits, decode: Traits) -> bool:
    """The same tensor-parallel size; unknown ones are taken to fit."""
    return not prefill.tp or not decode.tp or prefill.tp == decode.tp
