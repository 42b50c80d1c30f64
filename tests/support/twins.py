"""Runs tests over both twins of what is compiled where there is a compiler: `from tests.support.twins import twin`."""

from __future__ import annotations

import importlib

import pytest

MODULES = ("shm.cells", "shm.seqlock", "shm.hashtable.layout", "broker.prefix.keys")
"""What has a compiled twin; the module's `compiled` is None where it was not built."""


@pytest.fixture(autouse=True, params=["python", "compiled"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The twin that whatever is made in this test uses."""
    for name in MODULES:
        if request.param == "python":
            monkeypatch.setattr(f"{name}.compiled", None)
        elif importlib.import_module(name).compiled is None:
            pytest.skip("it was not compiled here")
    return str(request.param)
