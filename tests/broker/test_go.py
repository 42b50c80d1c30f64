"""How a Go program writes, and what it says of JSON: the cases are its standard library's own words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.faces import go
from broker.faces.go_json import syntax_error

ENDED = "unexpected end of JSON input"
VALUE = "looking for beginning of value"
KEY = "looking for beginning of object key string"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", ENDED),
        (b" ", ENDED),
        (b"{", ENDED),
        (b"[", ENDED),
        (b'"abc', ENDED),
        (b'{"a"', ENDED),
        (b'{"a":', ENDED),
        (b'{"a":1', ENDED),
        (b"[1", ENDED),
        (b"[1,", ENDED),
        (b"nonsense", "invalid character 'o' in literal null (expecting 'u')"),
        (b"nul", "invalid character ' ' in literal null (expecting 'l')"),
        (b'{"a":tru}', "invalid character '}' in literal true (expecting 'e')"),
        (b"faLse", "invalid character 'L' in literal false (expecting 'l')"),
        (b"None", f"invalid character 'N' {VALUE}"),
        (b"NaN", f"invalid character 'N' {VALUE}"),
        (b'{"role":}', f"invalid character '}}' {VALUE}"),
        (b"[1,]", f"invalid character ']' {VALUE}"),
        (b"[,]", f"invalid character ',' {VALUE}"),
        (b"]", f"invalid character ']' {VALUE}"),
        (b"'x'", rf"invalid character '\'' {VALUE}"),
        (b"\xff", f"invalid character 'ÿ' {VALUE}"),
        (b"\xef\xbb\xbf{}", f"invalid character 'ï' {VALUE}"),
        (b"\x00", rf"invalid character '\x00' {VALUE}"),
        (b"\x80", rf"invalid character '\u0080' {VALUE}"),
        (b'{"role":"mixed",}', f"invalid character '}}' {KEY}"),
        (b"{'a':1}", rf"invalid character '\'' {KEY}"),
        (b"{1:1}", f"invalid character '1' {KEY}"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b":2}', "invalid character '\"' after object key:value pair"),
        (b'{"a":01}', "invalid character '1' after object key:value pair"),
        (b"[1 2]", "invalid character '2' after array element"),
        (b'{"a":[}', f"invalid character '}}' {VALUE}"),
        (b'{"a":[1}', "invalid character '}' after array element"),
        (b"{} x", "invalid character 'x' after top-level value"),
        (b"{}{}", "invalid character '{' after top-level value"),
        (b'"a\x01"', r"invalid character '\x01' in string literal"),
        (b'"a\nb"', r"invalid character '\n' in string literal"),
        (rb'"\q"', "invalid character 'q' in string escape code"),
        (rb'"\u00g0"', r"invalid character 'g' in \u hexadecimal character escape"),
        (b"-", "invalid character ' ' in numeric literal"),
        (b"-x", "invalid character 'x' in numeric literal"),
        (b"1.", "invalid character ' ' after decimal point in numeric literal"),
        (b"[1.x]", "invalid character 'x' after decimal point in numeric literal"),
        (b"[1e]", "invalid character ']' in exponent of numeric literal"),
        (b"[" * 10_001, "invalid character '[' exceeded max depth"),
    ],
)
def test_what_is_no_json_is_said_at_its_first_wrong_byte(text: bytes, said: str) -> None:
    assert syntax_error(text) == said
    assert go.complaint(text, "map[string]interface {}") == said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(JSON, st.sampled_from((None, 1)), st.booleans())
def test_what_is_json_is_not_complained_of(tree: object, indent: int | None, ascii_only: bool) -> None:
    assert syntax_error(json.dumps(tree, indent=indent, ensure_ascii=ascii_only).encode()) is None


@given(JSON, st.data())
def test_python_and_go_agree_on_what_is_json(tree: object, data: st.DataObject) -> None:
    text = bytearray(json.dumps(tree).encode())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place : place + 1] = data.draw(st.sampled_from((b"", b",", b"]", b"}", b'"', b"\\", b"-", b"x", b"0", b" ")))
    try:
        json.loads(text.decode())
        valid = True
    except ValueError:
        valid = False
    assert (syntax_error(bytes(text)) is None) is valid


@pytest.mark.parametrize(
    ("value", "kind"), [(b"[]", "array"), (b'"x"', "string"), (b"7", "number"), (b"true", "bool"), (b"{}", "object")]
)
def test_what_is_of_another_type_is_named(value: bytes, kind: str) -> None:
    assert go.complaint(value, "T") == f"json: cannot unmarshal {kind} into Go value of type T"


def test_a_long_text_is_not_scanned() -> None:
    assert go.complaint(b"[" + b"1," * 100_000, "T") == ENDED


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.5, "1.5"),
        (1.23456789, "1.23456789"),
        (1e20, "1e+20"),
        (1234567.5, "1.2345675e+06"),
        (1e-5, "1e-05"),
        (-0.5, "-0.5"),
        (100000.5, "100000.5"),
    ],
)
def test_floats_are_as_short_as_they_can_be(number: float, text: str) -> None:
    assert go.number(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (5e-7, "500ns"),
        (0.0005001, "500.1µs"),
        (0.00123, "1.23ms"),
        (2, "2s"),
        (90, "1m30s"),
        (3723.5, "1h2m3.5s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert go.duration(seconds) == text


def test_json_is_compact_and_safe_within_html() -> None:
    assert go.dumps({"a": "<&>\u2028", "b": [1, None]}) == b'{"a":"\\u003c\\u0026\\u003e\\u2028","b":[1,null]}'
