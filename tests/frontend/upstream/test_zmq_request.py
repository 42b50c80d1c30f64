"""A request for a native engine is what `broker.wire` would make of it, byte for byte, kept pieces or none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from frontend.upstream.base import Forms, Headers, UpstreamRequest
from frontend.upstream.zmq_request import encoded, opening

INCARNATION = bytes(range(16))
NAMES = st.sampled_from([b"x-a", b"x-b", b"accept", b"x-\xe4", b"x-request-id"])
HEADERS = st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=30)


def written(request: UpstreamRequest, number: int, headers: dict[str, str]) -> bytes:
    return wire.encode(
        wire.Request(INCARNATION, number, request.path, request.stream, headers, transfer=request.transfer)
    )


def plain(headers: Headers, ident: bytes) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        texts[key] = f"{texts[key]}, {text}" if key in texts else text
    if ident:
        texts.pop("x-request-id", None)
        texts["x-request-id"] = ident.decode()
    return texts


@given(
    HEADERS,
    st.text("abc-0", max_size=300).map(str.encode),
    st.text(max_size=300),
    st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans(), st.binary(max_size=300)), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_bytes_are_those_of_the_message(
    headers: Headers, ident: bytes, path: str, asked: list[tuple[int, bool, bytes]], known: bool
) -> None:
    begin, forms = opening(INCARNATION), Forms() if known else None
    for number, stream, transfer in asked:
        request = UpstreamRequest(
            path=path,
            headers=[*headers, (b"x-request-id", ident)] if ident else headers,
            body=b"{}",
            forms=forms,
            ident=ident,
            stream=stream,
            transfer=transfer,
        )
        assert encoded(begin, number, request) == written(request, number, plain(headers, ident))


def test_each_request_of_one_form_has_its_own_name() -> None:
    begin, forms = opening(INCARNATION), Forms()
    for ident in (b"a", b"b" * 40):
        request = UpstreamRequest(
            path="/p", headers=[(b"x-a", b"1"), (b"x-request-id", ident)], body=b"{}", forms=forms, ident=ident
        )
        expected = {"x-a": "1", "x-request-id": ident.decode()}
        assert encoded(begin, 7, request) == written(request, 7, expected)


def test_what_engines_do_not_need_stays_here() -> None:
    headers = [(b"host", b"h"), (b"x-a", b"1"), (b"accept-encoding", b"gzip"), (b"connection", b"close")]
    request = UpstreamRequest(path="/p", headers=headers, body=b"{}")
    assert encoded(opening(INCARNATION), 1, request) == written(request, 1, {"x-a": "1"})
