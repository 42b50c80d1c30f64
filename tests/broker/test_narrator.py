"""Events in the words of a face."""

from __future__ import annotations

import logging

import pytest

from broker.faces import FACES, FD_ROUTER, PENSTOCK, Event, Face
from broker.narrator import Narrator, printable


def test_an_event_is_told_in_the_faces_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="part")
    for face in (PENSTOCK, FD_ROUTER):
        Narrator(face, "part").tell(Event.ASKED_UNHEALTHY, url="http://a:1")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("part", "WARNING", "http://a:1 is not healthy"),
        ("part", "WARNING", "Server http://a:1 is not healthy"),
    ]


def test_a_face_without_a_line_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="part")
    narrator = Narrator(PENSTOCK, "part")
    assert not narrator.tells(Event.PARSED)
    narrator.tell(Event.PARSED, context="")
    assert caplog.records == []


def test_what_the_level_hides_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    narrator = Narrator(FD_ROUTER, "part")
    caplog.set_level(logging.INFO, logger="part")
    assert not narrator.tells(Event.FLEET)
    caplog.set_level(logging.DEBUG, logger="part")
    assert narrator.tells(Event.FLEET)


def test_facts_are_text_and_no_format(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="part")
    Narrator(FD_ROUTER, "part").tell(Event.UNREACHABLE, context="[req_id:%s] ", error="100 %d")
    assert caplog.messages == ["[req_id:%s] Failed to connect to backend service: 100 %d"]


class Facts(dict[str, object]):
    def __missing__(self, name: str) -> object:
        return 1


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_every_line_can_be_filled(face: Face) -> None:
    """One that cannot would be lost in an error of logging's own."""
    for line in face.lines.values():
        assert "%(" not in line.text % Facts()


@pytest.mark.parametrize(
    ("text", "shown"), [("id-1", "id-1"), ("a b\nc", "a?b?c"), ("é", "?"), ("%s", "%s"), ("x" * 300, "x" * 128)]
)
def test_text_from_outside_cannot_forge_a_line(text: str, shown: str) -> None:
    assert printable(text) == shown
