"""What a policy says to those who choose. Compiled: they ask it several things for every request."""

from __future__ import annotations

from collections.abc import Mapping

from mypy_extensions import mypyc_attr

from broker.policies.base import Loads, Why
from broker.route import RouteRequest


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy:
    """How one of the candidates is chosen (as a `Picker`), and what the choice means for the instance. A base class:
    compiled code calls a protocol's methods by their names."""

    def __init__(self, *, counts_prompts: bool) -> None:
        self.counts_prompts = counts_prompts
        """Tokens are the work that waits: they count until the answer begins. Else as long as the request."""
        self.why: Why | None = None
        """How the last pick came about; None where the view says it all."""

    def pick(self, request: RouteRequest, view: Loads) -> int:
        """As a `Picker`'s."""
        raise NotImplementedError

    def tokens(self, request: RouteRequest, slot: int) -> int:
        """Prompt tokens that the request is to count at the instance in `slot`, whoever chose it."""
        raise NotImplementedError

    def placed(self, request: RouteRequest, slot: int) -> None:
        """The request goes there now. Said of every attempt, and of nothing that was only considered."""
        raise NotImplementedError

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        """Tokens of the prompt that instances have been sent before, by slot; none where prompts are not looked up."""
        raise NotImplementedError
