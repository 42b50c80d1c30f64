"""The fields of a registration, as an engine or a person wrote them, or a `BadRegistration` that names the wrong one.

One table of fields serves the body of `POST /register`, an entry of register.yaml and a native engine's hello.
FastDeploy's fields and coercions hold, integers and strings mixed; where the original refused what its own engines
send (`metrics_port: null`, IPv6, host names) it is accepted. Unknown keys are ignored: engines send extra ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from broker import addresses, wire
from broker.errors import UNDECODABLE, BadRegistration, Fault, MetadataTooLarge, shown
from broker.faces import go
from broker.scheduler.fieldtypes import check_types
from broker.scheduler.registration import Registration
from broker.types import Connector, EngineKind, FastDeployFields, Instance, PairFields, Role

Fields = Mapping[str, Any]

MOST_CAPACITY = 1 << 31
MOST_MODELS = 256
_FASTDEPLOY_FIELDS = frozenset(FastDeployFields.__struct_fields__) - {"version"}  # a word that others use, too
_ZMQ_ADDRESS = re.compile(r"[A-Za-z0-9.-]{1,253}:\d{1,5}")


def parse_body(body: bytes, splitwise: bool, *, comma_lists: bool = True) -> Registration:
    """The JSON body of `POST /register`."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw] | None) or {}
        fields = {key: value if key == "transfer" else msgspec.json.decode(value) for key, value in raw.items()}
    except UNDECODABLE as e:
        detail = go.complaint(body, "manager.InstanceInfo")
        raise BadRegistration(f"the body must be a JSON object: {e}", fault=Fault.MALFORMED, detail=detail) from e
    return parse(fields, splitwise, comma_lists=comma_lists)


def parse(fields: object, splitwise: bool, *, comma_lists: bool = True) -> Registration:
    """Decoded fields. `transfer` may be a `msgspec.Raw`, which keeps the object byte for byte.

    `comma_lists`: FastDeploy's lists may be strings of words between commas, too. What is wrong is looked for in the
    original's order: the types of all its fields, their values, whether the role belongs here; then ours.
    """
    if not isinstance(fields, Mapping):
        raise BadRegistration("a registration must be a mapping of fields")
    check_types(fields, comma_lists=comma_lists)
    role = _role(fields)
    engine = _engine(fields)
    scheme, host = _host(fields, native=engine is EngineKind.NATIVE)
    port = _port("port", fields.get("port"))
    if port is None:
        raise _no_port(fields)
    fastdeploy = _fastdeploy(fields, splitwise)
    metrics_port = _port("metrics_port", fields.get("metrics_port")) or port
    if fastdeploy is not None:
        fastdeploy = msgspec.structs.replace(fastdeploy, metrics_port=str(metrics_port))
    _role_fits(role, splitwise)
    metrics_scheme = "http" if scheme == "tcp" else scheme
    return Registration(
        engine=engine,
        instance=Instance(
            url=f"{scheme}://{host}:{port}",
            role=role,
            engine=engine or EngineKind.OPENAI,
            models=_models(fields.get("models")),
            capacity=_integer("capacity", fields.get("capacity"), MOST_CAPACITY),
            metrics_url=f"{metrics_scheme}://{host}:{metrics_port}/metrics",
            load_endpoint=_load_endpoints(fields.get("load_endpoint")),
            transfer=_transfer(fields.get("transfer")),
            fastdeploy=fastdeploy,
            pair=_pair(fields),
        ),
    )


def from_hello(hello: wire.EngineHello, splitwise: bool) -> Instance:
    """A native engine's registration."""
    if len(hello.incarnation) != wire.INCARNATION_BYTES:
        raise bad("incarnation", f"must have {wire.INCARNATION_BYTES} bytes")
    if len(hello.transfer) > wire.MAX_TRANSFER_BYTES:
        raise _too_large(len(hello.transfer))
    _role_fits(hello.role, splitwise)
    return Instance(
        url=_endpoint("endpoint", hello.endpoint),
        role=hello.role,
        engine=EngineKind.NATIVE,
        models=_models(hello.models),
        capacity=_integer("capacity", hello.capacity, MOST_CAPACITY),
        incarnation=hello.incarnation,
        transfer=hello.transfer,
        name=_name(hello.name),
    )


def bad(field: str, reason: str, *, detail: str = "") -> BadRegistration:
    """`detail`: the same in the original's words."""
    return BadRegistration(f"{field} {reason}", param=field, detail=detail)


def _missing(field: str) -> BadRegistration:
    return BadRegistration(f"{field} is required", param=field, fault=Fault.MISSING)


def _no_port(fields: Fields) -> BadRegistration:
    if fields.get("port", "") is None:  # to the original null is 0
        return bad("port", "is required", detail="invalid port: 0")
    return _missing("port")


def _too_large(size: int) -> MetadataTooLarge:
    return MetadataTooLarge(
        f"transfer has {size} bytes, at most {wire.MAX_TRANSFER_BYTES} are carried", param="transfer"
    )


def _role(fields: Fields) -> Role:
    if "role" not in fields:
        raise _missing("role")
    value = fields["role"]
    if value is None:
        return Role.MIXED
    if not isinstance(value, str):
        return Role(value)
    if value.upper() in Role.__members__:
        return Role[value.upper()]
    raise bad(
        "role", f"must be mixed, prefill or decode (or 0, 1, 2), not {shown(value)}", detail=f"invalid role: {value}"
    )


def _role_fits(role: Role, splitwise: bool) -> None:
    if splitwise is (role is not Role.MIXED):
        return
    mode, wanted = ("with", "prefill and decode") if splitwise else ("without", "mixed")
    raise BadRegistration(
        f"role {role.name.lower()} does not fit: {mode} server.splitwise only {wanted} instances may register",
        param="role",
        fault=Fault.UNFIT,
        detail="splitwise mode only supports PREFILL/DECODE instances"
        if splitwise
        else "only MIXED instances are allowed",
    )


def _engine(fields: Fields) -> EngineKind | None:
    value = fields.get("engine")
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.lower() in tuple(EngineKind):
        return EngineKind(value.lower())
    raise bad("engine", f"must be one of {', '.join(EngineKind)}, not {shown(value)}")


def _host(fields: Fields, native: bool) -> tuple[str, str]:
    """Scheme and host."""
    value = fields.get("host_ip")
    if value is None or value == "":
        raise _missing("host_ip")
    try:
        return addresses.origin(value, ("tcp",) if native else ("http", "https"))
    except ValueError as e:
        raise bad("host_ip", str(e), detail=f"invalid host_ip: {value}") from e


def _port(field: str, value: object, *, detail: str = "invalid {field}: {value}") -> int | None:
    """None = not sent: missing, null or empty."""
    if value is None or value == "":
        return None
    number = _whole(value)
    if number is None or not 1 <= number <= 65535:
        said = detail.format(field=field, value=value)
        raise bad(field, f"must be a port from 1 to 65535, not {shown(value)}", detail=said)
    return number


def _whole(value: object) -> int | None:
    """A whole number, also as a string of digits; booleans are none."""
    if type(value) is int:
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    return None


def _integer(field: str, value: object, most: int) -> int:
    """A count; null or missing is 0."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise bad(field, f"must be an integer from 0 to {most}, not {shown(value)}")
    return value


def _models(value: object) -> tuple[str, ...]:
    names = _words("models", value) or []
    if len(names) > MOST_MODELS:
        raise bad("models", f"may list {MOST_MODELS} names, not {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise bad("models", f"must be a list of names or a comma-separated string; {shown(name)} is no name")
    return tuple(dict.fromkeys(names))


def _words(field: str, value: object) -> list[Any] | None:
    """A list, or a string of words between commas; None = null or missing."""
    if value is None:
        return None
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, list | tuple):
        return list(value)
    raise bad(field, f"must be a list or a comma-separated string, not {shown(value)}")


def _load_endpoints(value: object) -> str:
    """One ZMQ endpoint per data-parallel rank, comma-separated."""
    return ",".join(_endpoint("load_endpoint", endpoint) for endpoint in _words("load_endpoint", value) or ())


def _endpoint(field: str, value: object) -> str:
    try:
        return addresses.endpoint(value)
    except ValueError as e:
        raise bad(field, str(e)) from e


def _transfer(value: object) -> bytes:
    """A JSON object, kept as it was written."""
    if isinstance(value, msgspec.Raw):
        data = bytes(value)
    else:
        try:
            data = b"" if value is None else msgspec.json.encode(value)
        except (TypeError, RecursionError) as e:
            raise bad("transfer", f"must be a JSON object: {e}") from e
    if data in (b"", b"null"):
        return b""
    if not data.startswith(b"{"):
        raise bad("transfer", f"must be a JSON object, not {shown(value)}")
    if len(data) > wire.MAX_TRANSFER_BYTES:
        raise _too_large(len(data))
    return data


def _fastdeploy(fields: Fields, splitwise: bool) -> FastDeployFields | None:
    """Without `metrics_port`, which has its place in the order of what is looked at."""
    if _FASTDEPLOY_FIELDS.isdisjoint(fields):
        return None
    connector_port = _peer_port(fields, "connector_port", splitwise)
    engine_worker_queue_port = _peer_port(fields, "engine_worker_queue_port", splitwise)
    protocols = _words("transfer_protocol", fields.get("transfer_protocol"))
    for protocol in protocols or ():
        if protocol not in ("ipc", "rdma"):
            wanted = f"must list ipc, rdma or both, not {shown(protocol)}"
            raise bad("transfer_protocol", wanted, detail=f"invalid protocol: {protocol or ''}")
    rdma_ports = _numerals(fields, "rdma_ports")
    if splitwise:
        for index, rdma_port in enumerate(rdma_ports or ()):
            _port("rdma_ports", rdma_port, detail=f"rdma_ports[{index}] invalid port: {{value}}")
    return FastDeployFields(
        connector_port=connector_port,
        engine_worker_queue_port=engine_worker_queue_port,
        transfer_protocol=protocols,
        rdma_ports=rdma_ports,
        device_ids=_numerals(fields, "device_ids"),
        tp_size=fields.get("tp_size") or 0,
        version=_version(fields.get("version")),
        is_paused=fields.get("is_paused") is True,
    )


def _name(value: str) -> str:
    if len(value) > 64 or not value.isprintable():
        raise bad("name", f"must be of at most 64 printable characters, not {shown(value)}")
    return value


def _version(value: object) -> str:
    """Of the weights, in whatever form the engine has it; informative, so never a reason to refuse."""
    return str(value)[:64] if isinstance(value, str | int) else ""


def _pair(fields: Fields) -> PairFields | None:
    """What makes a pair; None = nothing of it was said."""
    connector = fields.get("connector") or None
    if connector is not None:
        if not isinstance(connector, str) or connector.lower() not in tuple(Connector):
            raise bad("connector", f"must be one of {', '.join(Connector)}, not {shown(connector)}")
        connector = Connector(connector.lower())
    address = fields.get("zmq_address") or ""
    if not isinstance(address, str) or (address and not _ZMQ_ADDRESS.fullmatch(address)):
        raise bad("zmq_address", f"must be like 10.0.0.1:21001, not {shown(address)}")
    if connector is Connector.P2P_NCCL and not address:
        raise bad("zmq_address", "is required by the connector p2p_nccl")
    found = PairFields(
        connector=connector,
        bootstrap_port=_port("bootstrap_port", fields.get("bootstrap_port")) or 0,
        zmq_address=address,
    )
    return None if found == PairFields() else found


def _peer_port(fields: Fields, field: str, splitwise: bool) -> str:
    """A port that only prefill/decode pairs use, so its range matters to them alone.

    null, which engines send for none, is "0", as the original shows it; it refused what it made of it.
    """
    if field not in fields:
        return ""
    value = fields[field]
    if value is None:
        return "0"
    if splitwise:
        number = _port(field, value)
        return "" if number is None else str(number)
    return str(value)[:64]


def _numerals(fields: Fields, field: str) -> list[str] | None:
    """A list of numbers in any spelling, as strings; null gives [], as the original has it."""
    if field not in fields:
        return None
    return [str(int(value) if type(value) is float else value) for value in _words(field, fields[field]) or []]
