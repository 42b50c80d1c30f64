"""The tree of errors, by cause. Each knows the HTTP status and the words of OpenAI's error body.

Foreign exceptions are translated where they enter (upstream, wire, config) with `raise … from`.
"""

from __future__ import annotations

from enum import Enum
from typing import Self

import msgspec

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for foreign bytes: of another shape, with text that is not UTF-8, or nested without end."""


def shown(value: object) -> str:
    """A value as a message may show it: short, on one line."""
    text = repr(bytes(value) if isinstance(value, msgspec.Raw) else value)
    return text if len(text) <= 60 else text[:57] + "..."


class PenstockError(Exception):
    """Root of the tree. `status` and `kind` make the answer; `retryable` says that another instance may be tried."""

    status = 500
    kind = "internal_error"
    code: str | None = None
    retryable = False
    retry_after_s: int | None = None
    request_id: str | None = None
    """Of a prefill/decode request, once it has one."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """For the client's answer, beside those of the form that it takes."""

    public: str | None = None
    """What clients are told instead of the message, which is for operators: it may name an instance's address."""

    def __init__(self, message: str, *, param: str | None = None, public: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if public is not None:
            self.public = public

    def with_header(self, name: bytes, value: bytes) -> Self:
        """The same for one client: an error may be told to several."""
        own = type(self).__new__(type(self), *self.args)
        own.__dict__.update(self.__dict__, headers=(*self.headers, (name, value)))
        return own


class ConfigError(PenstockError):
    """The configuration cannot be used; stops the start."""


class ConfigUnreadable(ConfigError):
    """The file cannot be read."""


class ConfigMalformed(ConfigError):
    """The file is no YAML, or a value in it is none of its key's."""


class PortMissing(ConfigError):
    """No port was given, and there is no default."""


# -- the client's side -------------------------------------------------------------------------------------


class BadRequest(PenstockError):
    """The request cannot be forwarded; nothing was sent to an engine."""

    status = 400
    kind = "invalid_request_error"


class Unread(BadRequest):
    """The request did not come whole, or may not."""


class BodyTooLarge(Unread):
    status = 413
    code = "body_too_large"


class ReceivingFull(Unread):
    """So much of other clients' bodies is being received that there is no room for more of this one."""

    status = 503
    kind = "service_unavailable"
    code = "receiving_full"
    retry_after_s = 1


class PairsOnly(BadRequest):
    """The route cannot be served by prefill/decode pairs, and there are no other instances."""

    code = "not_for_pairs"


class ModelNotFound(PenstockError):
    """Every candidate's models are known, and none serves the model asked for."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class NoInstance(PenstockError):
    """No ready instance of the role."""

    status = 503
    kind = "service_unavailable"
    code = "no_instance"
    retry_after_s = 1


class QueueFull(PenstockError):
    """Every candidate is saturated, and as many requests wait as may."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeout(PenstockError):
    """No instance had room for the request within the time that it may wait."""

    status = 503
    kind = "service_unavailable"
    code = "queue_timeout"
    retry_after_s = 1


# -- the engine's side -------------------------------------------------------------------------------------


class UpstreamError(PenstockError):
    """An engine failed; before the first byte another one may be tried."""

    status = 502
    kind = "upstream_error"
    code = "upstream_failed"
    retryable = True


class ConnectFailed(UpstreamError):
    """Nothing reached the engine."""

    code = "connect_failed"
    public = "the engine cannot be reached"


class EngineSaturated(UpstreamError):
    """An engine takes no more now: a native one that is at its mark (EAGAIN), or any that says so. It is not broken."""

    status = 503
    code = "engine_saturated"
    retry_after_s = 1
    public: str | None = "the engine takes no more requests now"


class GivenBack(EngineSaturated):
    """An engine stopped a request in the middle, for want of room, and asks for another one to serve it."""

    code = "given_back"
    public = None


class UpstreamBroken(UpstreamError):
    """The engine, or the way to it, failed after the request was sent."""

    code = "upstream_broken"


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"
    retryable = False


class Aborted(PenstockError):
    """Somebody asked for the end of the request (`POST /v1/abort_requests`)."""

    status = 499
    kind = "aborted"
    code = "request_aborted"


class ClientTooSlow(PenstockError):
    """The client read so slowly that its share of memory was used up."""

    status = 499
    kind = "client_error"
    code = "client_too_slow"


# -- registration and the table ----------------------------------------------------------------------------


class Fault(Enum):
    """What is wrong with a registration, in the order in which it is looked at."""

    MALFORMED = 1  # no JSON object, or a field of a wrong type
    MISSING = 2
    INVALID = 3
    UNFIT = 4  # nothing is wrong with it, but it does not belong here


class BadRegistration(BadRequest):
    """A field of a registration is missing or wrong; the message names it."""

    def __init__(
        self, message: str, *, param: str | None = None, fault: Fault = Fault.INVALID, detail: str = ""
    ) -> None:
        """`detail`: the same in FastDeploy's words."""
        super().__init__(message, param=param)
        self.fault = fault
        self.detail = detail or message


class MetadataTooLarge(BadRegistration):
    """An instance's metadata does not fit its blob in shared memory."""


class Unhealthy(PenstockError):
    """The instance that registers does not answer its health check."""

    status = 503
    kind = "service_unavailable"
    code = "not_healthy"

    def __init__(self, message: str, *, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class TableFull(PenstockError):
    """Every slot is taken or resting."""

    status = 503
    kind = "service_unavailable"
    code = "table_full"
    retry_after_s = 5


class SchedulerAway(PenstockError):
    """The scheduler does not answer; serving goes on, changes to the fleet do not."""

    status = 503
    kind = "service_unavailable"
    code = "scheduler_away"
    retry_after_s = 1


class WireError(PenstockError):
    """A frame that is malformed, oversized or foreign. Counted, logged once per peer, dropped."""
