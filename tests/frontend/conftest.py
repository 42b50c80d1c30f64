from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend import conduit
from tests.frontend.flowing import LOOPS, Player
from tests.frontend.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.frontend.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(params=LOOPS)
def player(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Player:
    if conduit.compiled is None:
        pytest.skip("the short way was not compiled here")
    return Player(tmp_path, request.param, caplog, monkeypatch)
