"""The atomic steps: each is one of the files in `lua/`, which begins with its contract."""

from __future__ import annotations

from importlib.resources import files

STEPS = ("join", "leave", "beat", "publish", "survey", "offer", "collect", "accept", "give_back")


def sources() -> dict[str, str]:
    """The text of each step, by name."""
    folder = files(__package__) / "lua"
    return {step: (folder / f"{step}.lua").read_text(encoding="utf-8") for step in STEPS}
