"""The JSON types of FastDeploy's registration fields: looked at before any field's value is, as a typed decoder would.

null is never wrong here: it stands for "not sent", or for the type's zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from broker.errors import BadRegistration, Fault, shown
from broker.faces import go
from broker.faces.go import kind


def check_types(fields: Mapping[str, Any], *, comma_lists: bool) -> None:
    """`comma_lists`: a string of words between commas is a list. Raises `BadRegistration`, fault MALFORMED."""
    for field, check in _CHECKS.items():
        value = fields.get(field)
        if value is not None and not (comma_lists and isinstance(value, str) and check in _LISTS):
            check(field, value)


def wrong(field: str, wanted: str, value: object, detail: str) -> BadRegistration:
    """`detail`: in the words of the original."""
    return BadRegistration(
        f"{field} must be {wanted}, not {shown(value)}", param=field, fault=Fault.MALFORMED, detail=detail
    )


def _role(field: str, value: object) -> None:
    wanted = "mixed, prefill or decode (or 0, 1, 2)"
    if isinstance(value, str):
        return
    if not _is_int64(value):
        raise wrong(field, wanted, value, _mismatch(field, value, "string"))
    if value not in (0, 1, 2):
        raise wrong(field, wanted, value, f"invalid role integer: {value}")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise wrong(field, "an IPv4 or IPv6 address or a host name", value, _mismatch(field, value, "string"))


def _number_or_text(field: str, value: object) -> None:
    if not isinstance(value, str) and not _is_int64(value):
        raise wrong(field, "an integer or a string", value, _mismatch(field, value, "string"))


def _number(field: str, value: object) -> None:
    if not _is_int64(value):
        said = go.number(value) if type(value) is float else str(value)
        shape = f"number {said}" if kind(value) == "number" else kind(value)
        raise wrong(field, "an integer", value, _mismatch(field, value, "int", shape))


def _texts(field: str, value: object) -> None:
    for element in _list(field, value, "[]string"):
        if element is not None and not isinstance(element, str):
            raise wrong(field, "a list of words", value, _mismatch(field, element, "string"))


def _numerals(field: str, value: object) -> None:
    for index, element in enumerate(_list(field, value, "[]interface {}")):
        if type(element) is float and not (element.is_integer() and _is_int64(int(element))):
            detail = f"element {index}: {go.number(element)} not integer"
        elif type(element) is int and not _is_int64(element):
            detail = f"element {index}: {go.number(float(element))} not integer"
        elif type(element) not in (int, float, str):
            detail = f"element {index}: type {_GO[kind(element)]} unsupported"
        else:
            continue
        raise wrong(field, "a list of integers or strings", value, detail)


def _list(field: str, value: object, wanted: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise wrong(field, "a list", value, _mismatch(field, value, wanted))
    return list(value)


def _is_int64(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _mismatch(field: str, value: object, wanted: str, shape: str = "") -> str:
    return f"json: cannot unmarshal {shape or kind(value)} into Go struct field InstanceInfo.{field} of type {wanted}"


_GO = {"null": "<nil>", "bool": "bool", "array": "[]interface {}", "object": "map[string]interface {}"}
_LISTS = (_texts, _numerals)
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "role": _role,
    "host_ip": _text,
    "port": _number_or_text,
    "connector_port": _number_or_text,
    "engine_worker_queue_port": _number_or_text,
    "transfer_protocol": _texts,
    "rdma_ports": _numerals,
    "device_ids": _numerals,
    "metrics_port": _number_or_text,
    "tp_size": _number,
}
