"""A bounded memory of what pure functions gave lately. Remembering an answer changes none, and forgetting it neither.

Threads may use one at once: two that miss together compute together, and no more.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["Lately"]

K = TypeVar("K")
V = TypeVar("V")


class Lately(Generic[K, V]):
    """At most `most` answers by what they are of. The older half is forgotten at once, which costs nothing per use."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._new: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def get(self, key: K) -> V | None:
        """The answer to `key`, if it is remembered."""
        found = self._new.get(key)
        return self._old.get(key) if found is None else found

    def note(self, key: K, value: V) -> None:
        """Remember an answer. None is none."""
        if len(self._new) >= self.most // 2:
            self._old, self._new = self._new, {}
        self._new[key] = value

    def clear(self) -> None:
        """Forget all."""
        self._new, self._old = {}, {}
