"""A finite KV cache in blocks, with prefix caching: what is pinned, what may be evicted, what happened.

    capacity = private (reserved by running sequences) + cached (known by hash: pinned, or idle and evictable) + free

A block's hash chains over its tokens and all before it, so equal hashes mean equal prefixes. Events are plain data in
vLLM's map form.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]


class Chain:
    """The block hashes of one growing sequence of tokens, computed once each."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.hashes: list[int] = []

    def extend(self, tokens: Sequence[int], blocks: int) -> None:
        """Makes sure that the first `blocks` blocks of `tokens` are hashed."""
        size = self._block_size
        for i in range(len(self.hashes), blocks):
            parent = self.hashes[-1] if self.hashes else 0
            data = array("Q", (parent, *tokens[i * size : (i + 1) * size])).tobytes()
            self.hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


class Holding:
    """What one sequence holds of the cache."""

    __slots__ = ("pinned", "private")

    def __init__(self, pinned: list[int], private: int) -> None:
        self.pinned = pinned
        """Hashes of cached blocks it uses, head first."""
        self.private = private
        """Blocks reserved for it that have no hash yet."""


class Cache:
    """Owner: the model."""

    def __init__(self, capacity: int, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.events: list[Event] = []
        """What happened since the owner last took them."""
        self._users: dict[int, int] = {}
        """Cached blocks: hash -> sequences that pin it."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody pins, least recently used first."""
        self._private = 0

    @property
    def used(self) -> int:
        """Blocks that running sequences hold; idle cached blocks are as good as free."""
        return len(self._users) - len(self._idle) + self._private

    @property
    def occupied(self) -> int:
        """Blocks that hold anything; never above `capacity`."""
        return len(self._users) + self._private

    def hits(self, hashes: Sequence[int]) -> int:
        """How many leading blocks are cached."""
        for i, block in enumerate(hashes):
            if block not in self._users:
                return i
        return len(hashes)

    def reserve(self, hashes: Sequence[int], blocks: int) -> Holding | None:
        """Room for `blocks` blocks, the leading cached ones of `hashes` shared; None when there is none now."""
        hits = list(hashes[: self.hits(hashes)])
        fresh = blocks - len(hits)
        idle_hits = sum(1 for block in hits if block in self._idle)
        if fresh > self.capacity - self.used - idle_hits:
            return None
        for block in hits:
            self._users[block] += 1
            self._idle.pop(block, None)
        while self.capacity - self.occupied < fresh:
            evicted, _ = self._idle.popitem(last=False)
            del self._users[evicted]
            self.events.append({"type": "BlockRemoved", "block_hashes": [evicted], "medium": "GPU"})
        self._private += fresh
        return Holding(hits, fresh)

    def store(self, holding: Holding, chain: Sequence[int], tokens: Sequence[int], blocks: int) -> None:
        """The first `blocks` blocks of the sequence are computed now: those without a hash get theirs."""
        first = len(holding.pinned)
        stored = []
        for block in chain[first:blocks]:
            if block in self._users:  # somebody else computed the same at the same time: share theirs
                self._users[block] += 1
                self._idle.pop(block, None)
            else:
                self._users[block] = 1
                stored.append(block)
            holding.pinned.append(block)
            holding.private -= 1
            self._private -= 1
        if stored:
            size = self.block_size
            # One event per run of new blocks would split at shared ones; these come at the head, so there is one run.
            begin = chain.index(stored[0])
            self.events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": stored,
                    "parent_block_hash": chain[begin - 1] if begin else None,
                    "token_ids": list(tokens[begin * size : (begin + len(stored)) * size]),
                    "block_size": size,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                }
            )

    def release(self, holding: Holding) -> None:
        """The sequence is over. Its blocks stay cached, the tail to be evicted before the head."""
        self._private -= holding.private
        for block in reversed(holding.pinned):
            self._users[block] -= 1
            if not self._users[block]:
                self._idle[block] = None
        holding.pinned, holding.private = [], 0

    def clear(self) -> None:
        """Forgets every idle block."""
        for block in self._idle:
            del self._users[block]
        self._idle.clear()
        self.events.append({"type": "AllBlocksCleared"})
