"""What a choice by load alone means for the instance: FastDeploy's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from broker.policies.base import Loads, Picker, Why
from broker.route import RouteRequest


class WholePrompts:
    """A picker's policy by which every prompt counts whole, wherever it goes, and as long as its request: the
    original's rule. Nothing is remembered of it."""

    def __init__(self, picker: Picker) -> None:
        self.pick: Callable[[RouteRequest, Loads], int] = picker.pick
        self.counts_prompts = False
        self.why: Why | None = None

    def tokens(self, request: RouteRequest, slot: int) -> int:
        return request.prompt_tokens

    def placed(self, request: RouteRequest, slot: int) -> None:
        pass

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return {}
