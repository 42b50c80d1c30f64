"""What a choice by load alone means for the instance: FastDeploy's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from broker.policies.base import Loads, Picker
from broker.policies.policy import Policy
from broker.route import RouteRequest


class WholePrompts(Policy):
    """A picker's policy by which every prompt counts whole, wherever it goes, and as long as its request: the
    original's rule. Nothing is remembered of it."""

    def __init__(self, picker: Picker) -> None:
        super().__init__(counts_prompts=False)
        self._pick: Callable[[RouteRequest, Loads], int] = picker.pick

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return self._pick(request, view)

    def tokens(self, request: RouteRequest, slot: int) -> int:
        return request.prompt_tokens

    def placed(self, request: RouteRequest, slot: int) -> None:
        pass

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return {}
