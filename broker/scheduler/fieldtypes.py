"""The JSON types of FastDeploy's registration fields: looked at before any field's value is, as a typed decoder would.

null is never wrong here: it stands for "not sent", or for the type's zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from broker.errors import BadRegistration, Fault
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


def shown(value: object) -> str:
    """A value as an error message may show it: short, on one line."""
    text = repr(bytes(value) if isinstance(value, msgspec.Raw) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _role(field: str, value: object) -> None:
    wanted = "mixed, prefill or decode (or 0, 1, 2)"
    if isinstance(value, str):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(field, wanted, value, _mismatch(field, value, "string"))
    if value not in (0, 1, 2):
        raise wrong(field, wanted, value, f"invalid role integer: {value}")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise wrong(field, "an IPv4 or IPv6 address or a host name", value, _mismatch(field, value, "string"))


def _number_or_text(field: str, value: object) -> None:
    if type(value) is not int and not isinstance(value, str):
        raise wrong(field, "an integer or a string", value, _mismatch(field, value, "string"))


def _number(field: str, value: object) -> None:
    if type(value) is not int:
        raise wrong(field, "an integer", value, _mismatch(field, value, "int"))


def _texts(field: str, value: object) -> None:
    for index, element in enumerate(_list(field, value)):
        if not isinstance(element, str):
            raise wrong(field, "a list of words", value, _mismatch(f"{field}[{index}]", element, "string"))


def _numerals(field: str, value: object) -> None:
    for index, element in enumerate(_list(field, value)):
        if type(element) is float and not element.is_integer():
            detail = f"element {index}: {element:g} not integer"
        elif type(element) not in (int, float, str):
            detail = f"element {index}: type {_GO[kind(element)]} unsupported"
        else:
            continue
        raise wrong(field, "a list of integers or strings", value, detail)


def _list(field: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise wrong(field, "a list", value, _mismatch(field, value, "[]string"))
    return list(value)


def _mismatch(field: str, value: object, wanted: str) -> str:
    return f"json: cannot unmarshal {kind(value)} into Go struct field InstanceInfo.{field} of type {wanted}"


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
