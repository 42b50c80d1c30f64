"""What `frontend.connection` uses of uvicorn without uvicorn promising it. Fails here, and not under load, when a
new version moves a name; pyproject.toml pins the minor version until this file has been looked at."""

from __future__ import annotations

import inspect
import re

import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from frontend.connection import Connection
from tests.support.processes import ROOT

OVERRIDDEN = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "data_received": ["data"],
    "eof_received": [],
    "pause_writing": [],
    "resume_writing": [],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_message_complete": [],
    "on_response_complete": [],
    "_start_asgi_task": ["cycle", "app"],
    "shutdown": [],
}
PROTOCOL = {
    *("app", "client", "config", "connections", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser"),
    *("pipeline", "scope", "server_state", "tasks", "transport", "url"),
}
CYCLE = {
    *("body", "disconnected", "keep_alive", "message_event", "more_body", "on_response", "response_complete"),
    *("response_started", "waiting_for_100_continue"),
}


def assigned(kind: type) -> set[str]:
    """Names that a class's `__init__` gives its objects."""
    return set(re.findall(r"self\.(\w+)[^=\n]*= ", inspect.getsource(kind.__init__)))


def test_the_version_is_the_one_that_was_looked_at() -> None:
    assert uvicorn.__version__.startswith("0.54."), "look at frontend/connection.py and this file, then move both pins"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_still_called_so(name: str) -> None:
    theirs, ours = getattr(HttpToolsProtocol, name), getattr(Connection, name)
    assert ours is not theirs
    assert [p for p in inspect.signature(theirs).parameters if p != "self"] == OVERRIDDEN[name]
    assert len(inspect.signature(ours).parameters) == len(inspect.signature(theirs).parameters)


def test_what_a_connection_holds_is_still_called_so() -> None:
    held = assigned(HttpToolsProtocol) | {"url"}
    assert held >= PROTOCOL, PROTOCOL - held


def test_what_a_cycle_holds_is_still_called_so() -> None:
    held = assigned(RequestResponseCycle)
    assert held >= CYCLE, CYCLE - held
    ours = (ROOT / "frontend" / "lean.py").read_text()  # compiled, it has no source to inspect
    for name in ("response_complete", "keep_alive", "more_body"):  # what uvicorn looks at in ours
        assert f"self.{name} = " in ours


def test_the_rest_is_still_called_so() -> None:
    state = ServerState()
    assert (state.total_requests, state.connections, state.tasks, state.default_headers) == (0, set(), set(), [])
    assert callable(FlowControl.resume_reading)
    assert httptools_impl.STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    # A request is told that it is complete through the bound method that it was made with.
    assert "on_response=self.on_response_complete" in inspect.getsource(HttpToolsProtocol.on_headers_complete)
