"""What the choice of an instance depends on. Compiled: each of it is asked for more than once in every request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker.types import Role


class RouteRequest:
    """What the choice of an instance depends on, and nothing else of the request. It does not change."""

    def __init__(
        self,
        *,
        model: str | None = None,
        role: Role = Role.MIXED,
        prompt_tokens: int = 0,
        session: str | None = None,
        prompt: str = "",
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.model: Final = model
        self.role: Final = role
        self.prompt_tokens: Final = prompt_tokens
        """Estimated tokens of the prompt (exact for token-id prompts)."""
        self.session: Final = session
        self.prompt: Final = prompt
        """The prompt's text, for policies that match prefixes."""
        self.prompt_ids: Final = prompt_ids
        """The token ids of a prompt that has no text, or those of its text, where they are known."""

    def __repr__(self) -> str:
        return f"<RouteRequest {self.role.name} model={self.model} tokens={self.prompt_tokens}>"

    def with_ids(self, ids: Sequence[int]) -> RouteRequest:
        """The same, its prompt's tokens known."""
        return RouteRequest(
            model=self.model,
            role=self.role,
            prompt_tokens=self.prompt_tokens,
            session=self.session,
            prompt=self.prompt,
            prompt_ids=ids,
        )

    def leg(self, role: Role, tokens: int) -> RouteRequest:
        """What one instance of a pair is chosen by."""
        return RouteRequest(
            model=self.model,
            role=role,
            prompt_tokens=tokens,
            session=self.session,
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
        )
