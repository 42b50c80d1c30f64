"""A registration as an engine or a person wrote it -> an `Instance`, or a `BadRegistration` that names the field.

One table of fields serves the body of `POST /register`, an entry of register.yaml and a native engine's hello.
FastDeploy's fields and coercions hold, integers and strings mixed; where the original refused what its own engines
send (`metrics_port: null`, IPv6, host names) it is accepted. Unknown keys are ignored: engines send extra ones.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from broker import wire
from broker.errors import UNDECODABLE, BadRegistration, MetadataTooLarge
from broker.types import Connector, EngineKind, FastDeployFields, Instance, PairFields, Role

Fields = Mapping[str, Any]

MOST_CAPACITY = 1 << 31
MOST_MODELS = 256
_FASTDEPLOY_FIELDS = frozenset(FastDeployFields.__struct_fields__)
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?")
_ZMQ_ADDRESS = re.compile(r"[A-Za-z0-9.-]{1,253}:\d{1,5}")
_ENDPOINT = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>\d{1,5})|ipc://[\x21-\x7e]{1,100}")


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, before the instance was probed."""

    instance: Instance
    """With `engine` OPENAI as long as the kind is not known."""
    engine: EngineKind | None = None
    """As registered; None = to be found by probing."""

    @property
    def names_models(self) -> bool:
        """It lists its models, so the server is not asked for them."""
        return bool(self.instance.models)

    @property
    def has_fastdeploy_fields(self) -> bool:
        """It carries fields that only FastDeploy's engines send: decides when probing finds no mark."""
        return self.instance.fastdeploy is not None

    def joined(
        self,
        engine: EngineKind,
        models: tuple[str, ...] = (),
        load_endpoint: str = "",
        engine_ids: tuple[str, ...] = (),
    ) -> Instance:
        """The instance with what probing found; what was registered has precedence."""
        ours = self.instance
        pair = ours.pair
        if engine_ids:
            pair = msgspec.structs.replace(pair or PairFields(), engine_ids=engine_ids)
        load_endpoint = ours.load_endpoint or load_endpoint
        polled = engine not in (EngineKind.OPENAI, EngineKind.NATIVE) and not load_endpoint
        return msgspec.structs.replace(
            ours,
            engine=engine,
            models=ours.models or models,
            load_endpoint=load_endpoint,
            metrics_url=ours.metrics_url if polled else "",
            pair=pair,
        )

    def rejoined(self, known: Instance) -> Instance:
        """The instance when one that is known and well registers again: what probing found then still holds.

        A native engine's own hello has precedence over what others say of it.
        """
        if known.is_native:
            return known
        engine_ids = known.pair.engine_ids if known.pair else ()
        return self.joined(self.engine or known.engine, known.models, known.load_endpoint, engine_ids)


def parse_body(body: bytes, splitwise: bool) -> Registration:
    """The JSON body of `POST /register`."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        fields = {key: value if key == "transfer" else msgspec.json.decode(value) for key, value in raw.items()}
    except UNDECODABLE as e:
        raise BadRegistration(f"the body must be a JSON object: {e}") from e
    return parse(fields, splitwise)


def parse(fields: object, splitwise: bool) -> Registration:
    """Decoded fields. `transfer` may be a `msgspec.Raw`, which keeps the object byte for byte."""
    if not isinstance(fields, Mapping):
        raise BadRegistration("a registration must be a mapping of fields")
    role = _role(fields, splitwise)
    engine = _engine(fields)
    scheme, host = _host(fields, native=engine is EngineKind.NATIVE)
    port = _port("port", fields.get("port"))
    if port is None:
        raise bad("port", "is required")
    metrics_port = _port("metrics_port", fields.get("metrics_port")) or port
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
            fastdeploy=_fastdeploy(fields, metrics_port, splitwise),
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
    )


def bad(field: str, reason: str) -> BadRegistration:
    return BadRegistration(f"{field} {reason}", param=field)


def _too_large(size: int) -> MetadataTooLarge:
    return MetadataTooLarge(
        f"transfer has {size} bytes, at most {wire.MAX_TRANSFER_BYTES} are carried", param="transfer"
    )


def _role(fields: Fields, splitwise: bool) -> Role:
    if "role" not in fields:
        raise bad("role", "is required")
    value = fields["role"]
    if value is None:
        value = Role.MIXED
    if isinstance(value, str) and value.upper() in Role.__members__:
        role = Role[value.upper()]
    elif type(value) in (int, Role) and value in tuple(Role):
        role = Role(value)
    else:
        raise bad("role", f"must be mixed, prefill or decode (or 0, 1, 2), not {_shown(value)}")
    _role_fits(role, splitwise)
    return role


def _role_fits(role: Role, splitwise: bool) -> None:
    if splitwise and role is Role.MIXED:
        raise bad("role", "mixed does not fit: with server.splitwise only prefill and decode instances may register")
    if not splitwise and role is not Role.MIXED:
        raise bad(
            "role", f"{role.name.lower()} does not fit: without server.splitwise only mixed instances may register"
        )


def _engine(fields: Fields) -> EngineKind | None:
    value = fields.get("engine")
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.lower() in tuple(EngineKind):
        return EngineKind(value.lower())
    raise bad("engine", f"must be one of {', '.join(EngineKind)}, not {_shown(value)}")


def _host(fields: Fields, native: bool) -> tuple[str, str]:
    """Scheme and host in the form they have within a URL: lower case, IPv6 in brackets."""
    value = fields.get("host_ip")
    if value is None or value == "":
        raise bad("host_ip", "is required")
    wanted = "must be an IPv4 or IPv6 address or a host name"
    if not isinstance(value, str):
        raise bad("host_ip", f"{wanted}, not {_shown(value)}")
    scheme, separator, host = value.strip().lower().partition("://")
    if not separator:
        scheme, host = ("tcp" if native else "http"), scheme
    if scheme not in (("tcp",) if native else ("http", "https")):
        raise bad("host_ip", f"has an unknown scheme: {_shown(value)}")
    host = host.removesuffix("/")
    try:
        if ":" in host:
            address = ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))
            if address.scope_id is not None:
                raise bad("host_ip", "must not have a scope id")
            return scheme, f"[{address.compressed}]"
        if host.rsplit(".", 1)[-1].isdigit():  # as browsers have it: what ends in a number is an IPv4 address
            return scheme, str(ipaddress.IPv4Address(host))
    except ipaddress.AddressValueError as e:
        raise bad("host_ip", f"{wanted}, not {_shown(value)}: {e}") from e
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise bad("host_ip", f"{wanted}, not {_shown(value)}")
    return scheme, host


def _port(field: str, value: object, *, lowest: int = 1) -> int | None:
    """None = not sent: missing, null or empty."""
    if value is None or value == "":
        return None
    number = _whole(value)
    if number is None or not lowest <= number <= 65535:
        raise bad(field, f"must be a port from {lowest} to 65535, not {_shown(value)}")
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
        raise bad(field, f"must be an integer from 0 to {most}, not {_shown(value)}")
    return value


def _models(value: object) -> tuple[str, ...]:
    names = _words("models", value) or []
    if len(names) > MOST_MODELS:
        raise bad("models", f"may list {MOST_MODELS} names, not {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise bad("models", f"must be a list of names or a comma-separated string; {_shown(name)} is no name")
    return tuple(dict.fromkeys(names))


def _words(field: str, value: object) -> list[Any] | None:
    """A list, or a string of words between commas; None = null or missing."""
    if value is None:
        return None
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, list | tuple):
        return list(value)
    raise bad(field, f"must be a list or a comma-separated string, not {_shown(value)}")


def _load_endpoints(value: object) -> str:
    """One ZMQ endpoint per data-parallel rank, comma-separated."""
    return ",".join(_endpoint("load_endpoint", endpoint) for endpoint in _words("load_endpoint", value) or ())


def _endpoint(field: str, value: object) -> str:
    """A ZMQ endpoint that others can connect to."""
    match = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if not match or (match["port"] and not 1 <= int(match["port"]) <= 65535):
        raise bad(field, f"must be tcp://host:port or ipc://path, not {_shown(value)}")
    if match["host"] in ("0.0.0.0", "[::]"):
        raise bad(field, f"must be an address to connect to, not the wildcard {match['host']}")
    return match[0]


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
        raise bad("transfer", f"must be a JSON object, not {_shown(value)}")
    if len(data) > wire.MAX_TRANSFER_BYTES:
        raise _too_large(len(data))
    return data


def _fastdeploy(fields: Fields, metrics_port: int, splitwise: bool) -> FastDeployFields | None:
    if _FASTDEPLOY_FIELDS.isdisjoint(fields):
        return None
    protocols = _words("transfer_protocol", fields.get("transfer_protocol"))
    for protocol in protocols or ():
        if protocol not in ("ipc", "rdma"):
            raise bad("transfer_protocol", f"must list ipc, rdma or both, not {_shown(protocol)}")
    rdma_ports = _numerals(fields, "rdma_ports")
    if splitwise:
        for rdma_port in rdma_ports or ():
            _port("rdma_ports", rdma_port)
    return FastDeployFields(
        connector_port=_peer_port(fields, "connector_port", splitwise),
        engine_worker_queue_port=_peer_port(fields, "engine_worker_queue_port", splitwise),
        transfer_protocol=protocols,
        rdma_ports=rdma_ports,
        device_ids=_numerals(fields, "device_ids"),
        metrics_port=str(metrics_port),
        tp_size=_integer("tp_size", fields.get("tp_size"), 1 << 20),
        version=_version(fields.get("version")),
    )


def _version(value: object) -> str:
    """Of the weights, in whatever form the engine has it; informative, so never a reason to refuse."""
    return str(value)[:64] if isinstance(value, str | int) else ""


def _pair(fields: Fields) -> PairFields | None:
    """What makes a pair; None = nothing of it was said."""
    connector = fields.get("connector") or None
    if connector is not None:
        if not isinstance(connector, str) or connector.lower() not in tuple(Connector):
            raise bad("connector", f"must be one of {', '.join(Connector)}, not {_shown(connector)}")
        connector = Connector(connector.lower())
    address = fields.get("zmq_address") or ""
    if not isinstance(address, str) or (address and not _ZMQ_ADDRESS.fullmatch(address)):
        raise bad("zmq_address", f"must be like 10.0.0.1:21001, not {_shown(address)}")
    if connector is Connector.P2P_NCCL and not address:
        raise bad("zmq_address", "is required by the connector p2p_nccl")
    found = PairFields(
        connector=connector,
        bootstrap_port=_port("bootstrap_port", fields.get("bootstrap_port")) or 0,
        zmq_address=address,
    )
    return None if found == PairFields() else found


def _peer_port(fields: Fields, field: str, splitwise: bool) -> str:
    """A port that only prefill/decode pairs use, so its range matters to them alone. null is "0" = none."""
    if field not in fields:
        return ""
    value = fields[field]
    if value is None:
        return "0"
    if splitwise:
        number = _port(field, value, lowest=0)
        return "" if number is None else str(number)
    if type(value) is int or isinstance(value, str):
        return str(value)[:64]
    raise bad(field, f"must be an integer or a string, not {_shown(value)}")


def _numerals(fields: Fields, field: str) -> list[str] | None:
    """A list of numbers in any spelling, as strings; null gives [], as the original has it."""
    if field not in fields:
        return None
    return list(_as_strings(field, _words(field, fields[field]) or []))


def _as_strings(field: str, values: Iterable[object]) -> Iterable[str]:
    for index, value in enumerate(values):
        if type(value) is float and value.is_integer():
            yield str(int(value))
        elif type(value) is int or isinstance(value, str):
            yield str(value)
        else:
            raise bad(field, f"element {index} must be an integer or a string, not {_shown(value)}")


def _shown(value: object) -> str:
    """A value as an error message may show it: short, on one line."""
    text = repr(bytes(value) if isinstance(value, msgspec.Raw) else value)
    return text if len(text) <= 60 else text[:57] + "..."
