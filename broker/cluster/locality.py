"""Which addresses mean something to this machine only, and what this machine is."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """The same for two processes exactly if a loopback address or a socket's path means the same to both.

    One kernel, one network and one tree of files: containers of one computer share the first alone.
    """
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "mnt")]
    return ":".join([_BOOT_ID.read_text().strip(), *map(str, namespaces)])


def is_local(url: str) -> bool:
    """Whether only processes of the same machine reach the address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "tcp"):
        return True  # ipc, inproc: and whatever else there may be
    host = parts.hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified or address.is_link_local
