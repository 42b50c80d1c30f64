from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.errors import BadRequest
from broker.splice import MOST_COLONS, MOST_MEMBERS, edit_members, find_member, members, replace_member


def found(body: bytes, name: str) -> bytes | None:
    span = find_member(body, name)
    return None if span is None else body[slice(*span)]


# -- finding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"model":"a"}', b'"a"'),
        (b' {\n\t"model" : "a"\r\n} ', b'"a"'),
        (b'{"x":1,"model":[1, {"model":2}],"y":2}', b'[1, {"model":2}]'),
        (b'{"model":12345678901234567890.50e+10}', b"12345678901234567890.50e+10"),
        (b'{"model":-0}', b"-0"),
        (b'{"model":null}', b"null"),
        (b'{"model":{}}', b"{}"),
        (b'{"model":""}', b'""'),
        (b'{"model":"\\"}\\\\"}', b'"\\"}\\\\"'),
        (b'{"mod\\u0065l":1}', b"1"),
        (b'{"\\u006d\\u006F\\u0064\\u0065\\u006c":1}', b"1"),
        ('{"ключ":"é","model":"日本語"}'.encode(), '"日本語"'.encode()),
    ],
)
def test_the_value_is_found_exactly(body: bytes, value: bytes) -> None:
    assert found(body, "model") == value


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"other":"model"}',
        b'{"other":{"model":1}}',
        b'{"other":["model", {"model":1}]}',
        b'{"other":"\\"model\\":1"}',
        b'{"Model":1,"model ":2,"mode":3,"models":4}',
        b'{"model\\\\":1}',
    ],
)
def test_what_only_looks_like_the_member_is_not_found(body: bytes) -> None:
    assert find_member(body, "model") is None


def test_names_beyond_ascii_are_found_however_they_are_spelled() -> None:
    assert found('{"é":1}'.encode(), "é") == found(b'{"\\u00e9":1}', "é") == b"1"
    assert found(b'{"\\ud83d\\ude00":1}', "😀") == found('{"😀":1}'.encode(), "😀") == b"1"


def test_members_stand_in_the_order_of_the_body() -> None:
    assert members(b'{"b":1,"a":[],"c":"x"}') == {"b": (5, 6), "a": (11, 13), "c": (18, 21)}


# -- replacing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b'{ "a" : 1.50 , "model" : "x" }', b'{ "a" : 1.50 , "model" : "NEW" }'),
        (b'{"mod\\u0065l":{"b":[1]},"z":1}', b'{"mod\\u0065l":"NEW","z":1}'),
        (b'{"model":1,"big":123456789012345678901234567890}', b'{"model":"NEW","big":123456789012345678901234567890}'),
    ],
)
def test_only_the_value_is_replaced(body: bytes, spliced: bytes) -> None:
    assert replace_member(body, "model", b'"NEW"') == spliced


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b"{}", b'{"model":"NEW"}'),
        (b" { \n } ", b' {"model":"NEW" \n } '),
        (b'{"a":1}', b'{"a":1,"model":"NEW"}'),
        (b'{\n  "a": {"model": 1}\n}\n', b'{\n  "a": {"model": 1},"model":"NEW"\n}\n'),
    ],
)
def test_an_absent_member_is_added_after_the_last(body: bytes, spliced: bytes) -> None:
    assert replace_member(body, "model", b'"NEW"') == spliced


def test_an_added_name_is_escaped() -> None:
    assert replace_member(b"{}", 'a"\n', b"1") == b'{"a\\"\\n":1}'


# -- refusing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":12,"a":1}',
        b'{"a":1,"a":12}',
        b'{"a":1,"b":2,"a":1}',
        b'{"a":1,"b":2,"a":3}',
        b'{"a":1,"\\u0061":1}',
        b'{"a":"x","b":1,"a":"x, \\"b\\":2"}',
        b'{"a":1 ,\n"a":1}',
        b'{"":1,"":2}',
        b'{"a":1.5,"a":1}',
        b'{"a":1,"a":1e5}',
    ],
)
def test_a_member_that_comes_twice_is_refused_because_engines_differ_in_which_they_believe(body: bytes) -> None:
    with pytest.raises(BadRequest, match="more than once"):
        members(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b'{"a"',
        b'{"a":',
        b'{"a":1',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a":1}}',
        b'{"a":1} x',
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":tru}',
        b'{"a":"\x01"}',
        b'{"a":"\\x"}',
        b'{"a":"\\u12"}',
        b'{"a":[1,]}',
        b'{"a":[}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"\xff":1}',
        b"{'a':1}",
        b"{a:1}",
        b"\xef\xbb\xbf{}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        members(body)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"a"', b"1", b'[{"a":1}]'])
def test_json_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="not a JSON object"):
        members(body)


# -- any object --------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRICKY = st.sampled_from(["model", "a", "b", '"', "\\", "}", '":1,"model', "", "\u2028", "é", "😀"])
NAMES = st.one_of(TRICKY, TEXT)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
SPACE = st.text(" \t\n\r", max_size=3)


@st.composite
def spelled(draw: st.DrawFn, pairs: list[tuple[str, Any]]) -> bytes:
    """An object's members as JSON, with white space anywhere and any escaping."""

    def gap() -> str:
        return draw(SPACE)

    def text(value: object) -> str:
        indent = draw(st.sampled_from([None, 1]))
        return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)

    parts = [f"{gap()}{text(name)}{gap()}:{gap()}{text(value)}{gap()}" for name, value in pairs]
    return f"{gap()}{{{','.join(parts) or gap()}}}{gap()}".encode()


@st.composite
def objects(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    content = draw(st.dictionaries(NAMES, VALUES, max_size=6))
    return content, draw(spelled(list(content.items())))


@given(made=objects())
def test_every_member_reads_as_the_standard_library_reads_it(made: tuple[dict[str, Any], bytes]) -> None:
    content, body = made
    spans = members(body)
    assert list(spans) == list(content)
    for name, (start, end) in spans.items():
        assert json.loads(body[start:end]) == content[name]
        assert body[start:end].strip() == body[start:end]


@given(made=objects(), name=NAMES, value=VALUES)
def test_replacing_changes_that_member_and_no_other_byte(
    made: tuple[dict[str, Any], bytes], name: str, value: Any
) -> None:
    content, body = made
    literal = json.dumps(value).encode()
    spliced = replace_member(body, name, literal)
    assert json.loads(spliced) == {**content, name: value}
    span = find_member(spliced, name)
    assert span is not None
    start, end = span
    assert spliced[start:end] == literal
    old = find_member(body, name)
    if old is not None:
        assert (spliced[:start], spliced[end:]) == (body[: old[0]], body[old[1] :])
    else:
        added = (b"," if content else b"") + msgspec.json.encode(name) + b":"
        assert spliced[:start].endswith(added)
        assert spliced[: start - len(added)] + spliced[end:] == body


@given(pairs=st.lists(st.tuples(st.sampled_from(["a", "é", '"']), VALUES), min_size=4, max_size=6), data=st.data())
def test_repeated_names_are_refused_wherever_they_stand(pairs: list[tuple[str, Any]], data: st.DataObject) -> None:
    with pytest.raises(BadRequest, match="more than once"):
        members(data.draw(spelled(pairs)))


@given(made=objects(), cut=st.integers(1, 200))
def test_a_truncated_body_is_refused(made: tuple[dict[str, Any], bytes], cut: int) -> None:
    body = made[1].rstrip()
    with pytest.raises(BadRequest):
        members(body[:-cut])


@given(body=st.binary(max_size=40))
@example(b'{"a":1}\x00')
def test_any_bytes_give_members_or_bad_request(body: bytes) -> None:
    try:
        spans = members(body)
    except BadRequest:
        return
    assert set(spans) == set(json.loads(body))


# -- several at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "changes", "edited"),
    [
        (b'{"a":1,"b":2}', {}, b'{"a":1,"b":2}'),
        (b'{"a":1,"b":2}', {"b": b"3", "a": b"4"}, b'{"a":4,"b":3}'),
        (b' { "a" : 1 , "b":2,\n"c" : [3] } ', {"a": None, "c": b"9", "d": b"4"}, b' {"b":2,\n"c" : 9,"d":4 } '),
        (b'{"a":1,"b":2}', {"b": None}, b'{"a":1}'),
        (b'{ "a":1}', {"b": b"2"}, b'{ "a":1,"b":2}'),
        (b'{"a":1}', {"a": None}, b"{}"),
        (b'{"a":1}', {"a": None, "b": b"2"}, b'{"b":2}'),
        (b"{ }", {"b": b"2", "c": b"3", "x": None}, b'{"b":2,"c":3 }'),
        (b'{"\\u0061":1,"n":9007199254740993}', {"a": b"2"}, b'{"\\u0061":2,"n":9007199254740993}'),
    ],
)
def test_members_are_exchanged_taken_out_and_added_at_once(
    body: bytes, changes: dict[str, bytes | None], edited: bytes
) -> None:
    assert edit_members(body, changes) == edited


@pytest.mark.parametrize("body", [b"[]", b"", b'{"a":1,"a":2}'])
def test_what_is_no_object_of_single_members_is_not_edited(body: bytes) -> None:
    with pytest.raises(BadRequest):
        edit_members(body, {"b": b"1"})


@given(
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=5),
    st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=5),
    st.sampled_from([None, 2]),
)
def test_editing_does_what_it_does_to_the_decoded_object(
    tree: dict[str, int], changes: dict[str, int | None], indent: int | None
) -> None:
    body = json.dumps(tree, indent=indent).encode()
    edited = edit_members(body, {k: None if v is None else str(v).encode() for k, v in changes.items()})
    merged = {**tree, **changes}
    assert json.loads(edited) == {k: v for k, v in merged.items() if v is not None}


@pytest.mark.parametrize("count", [MOST_MEMBERS, MOST_COLONS])
def test_a_body_with_too_many_members_is_refused_before_it_stops_everything(count: int) -> None:
    body = ("{" + ",".join(f'"{n}":0' for n in range(count + 1)) + "}").encode()
    with pytest.raises(BadRequest, match=f"more than {count} (members|colons)"):
        members(body)
