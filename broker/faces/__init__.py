"""The faces of the program, by name; `server.compat` chooses."""

from __future__ import annotations

from broker.config import Config
from broker.faces.base import Estimate, Event, Face, Line, Misled, Said
from broker.faces.fd_router import FD_ROUTER
from broker.faces.penstock import PENSTOCK

__all__ = ["FACES", "FD_ROUTER", "PENSTOCK", "Estimate", "Event", "Face", "Line", "Misled", "Said", "face_of"]

FACES = {face.name: face for face in (PENSTOCK, FD_ROUTER)}


def face_of(config: Config) -> Face:
    return FACES[config.server.compat]
