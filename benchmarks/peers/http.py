"""A request or two, for starting routers and reading their pages; the load comes from the C tool."""

from __future__ import annotations

import urllib.error
import urllib.request


def get(url: str) -> bytes:
    return _call(url, None)


def post(url: str, body: bytes) -> bytes:
    return _call(url, body)


def answers(url: str, *, any_status: bool = False) -> bool:
    """Whether there is an answer of 200 (or any at all)."""
    try:
        _call(url, None)
    except urllib.error.HTTPError:
        return any_status
    except OSError:
        return False
    return True


def _call(url: str, body: bytes | None, timeout_s: float = 10.0) -> bytes:
    """Raises OSError; a status of 400 or more is one."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never by a proxy
    with opener.open(request, timeout=timeout_s) as response:
        data: bytes = response.read()
    return data
