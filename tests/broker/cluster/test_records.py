"""Bytes of other programs, or of other versions, are told from our own; addresses that mean something here only."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cluster import records
from broker.cluster.locality import is_local, machine
from broker.cluster.records import ForeignRecord, HostRecord, LoadRecord, Offer, Returned, Waiting, decode, encode
from broker.types import Instance, Role

DECODERS = [records.as_host, records.as_load, records.as_waiting, records.as_letter, records.as_instance]
OWN = [
    (records.as_host, HostRecord("machine", "host:1", 3)),
    (records.as_load, LoadRecord(5, 500, {3: 1.5})),
    (records.as_waiting, Waiting(7, Role.MIXED, None, 100, 60, 1, 3)),
    (records.as_letter, Offer("l", "h", "n", "0.1.2", 3, b"x")),
    (records.as_letter, Returned("l", used=True)),
    (records.as_instance, Instance(url="http://h:1", models=("m",))),
]


@pytest.mark.parametrize(("decoder", "record"), OWN)
def test_own_records_are_read_as_they_were_written(decoder: msgspec.msgpack.Decoder, record: msgspec.Struct) -> None:  # type: ignore[type-arg]  # of any record
    assert decode(decoder, encode(record)) == record


@given(st.sampled_from(DECODERS), st.binary(max_size=200))
def test_any_other_bytes_are_foreign(decoder: msgspec.msgpack.Decoder, data: bytes) -> None:  # type: ignore[type-arg]  # of any record
    own = [encode(record) for _, record in OWN]
    try:
        found = decode(decoder, data)
    except ForeignRecord:
        return
    assert data in own or encode(found)  # what is read is a record, whole


@pytest.mark.parametrize(
    "data",
    [
        encode(["load/2", 5, 500, {}]),  # another version
        encode(["load/1", -5, 500, {}]),
        encode(["load/1", 5]),
        encode(["load/1", 5, 500, {3: -1.0}]),
        b'{"request_queue_name": "q", "raw": {}}',  # FastDeploy's
        b"",
        b"\x91" * 5000,
        encode(["load/1", 5, 500, {}]) + b"\x00" * records.MAX_RECORD_BYTES,
    ],
)
def test_what_does_not_fit_is_refused(data: bytes) -> None:
    with pytest.raises(ForeignRecord):
        decode(records.as_load, data)


def test_a_field_that_a_later_version_appends_is_no_harm() -> None:
    assert decode(records.as_load, encode(["load/1", 5, 500, {}, "more"])) == LoadRecord(5, 500)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.9.9.9:8000", True),
        ("http://localhost:8000", True),
        ("http://a.localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://[::ffff:127.0.0.1]:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://[fe80::1%eth0]:8000", True),
        ("http://169.254.1.2:80", True),
        ("ipc://@abstract", True),
        ("ipc:///run/engine.sock", True),
        ("tcp://127.0.0.1:5555", True),
        ("tcp://10.0.0.1:5555", False),
        ("http://10.0.0.1:8000", False),
        ("https://engine.example:443", False),
        ("http://[2001:db8::1]:8000", False),
        ("http://node-7:8000", False),
    ],
)
def test_an_address_is_local_when_another_machine_would_reach_something_else(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_a_machine_is_the_same_for_all_that_share_its_loopback() -> None:
    assert machine() == machine()
    assert len(machine()) > 20
