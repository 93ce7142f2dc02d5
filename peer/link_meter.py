"""How fast the link to a peer is, as one download from it tells."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from protocol import params

__all__ = ["LinkMeter"]


class LinkMeter:
    """Counts the bytes of a download, as its `progress`. With several peers to ask it cannot tell whose link it was."""

    def __init__(self, peers: Sequence[bytes]) -> None:
        self._peer = peers[0] if len(peers) == 1 else b""
        self._began: tuple[float, int] | None = None
        self._last: tuple[float, int] = (0.0, 0)

    def __call__(self, here: int, total: int) -> None:
        """So many bytes of all are here; what was here at the first call came before."""
        self._last = (trio.current_time(), here)
        self._began = self._began or self._last

    def told(self) -> tuple[bytes, int]:
        """The peer and its bytes per second; (b"", 0) where too little was moved to tell."""
        if self._began is None or not self._peer:
            return b"", 0
        seconds, moved = self._last[0] - self._began[0], self._last[1] - self._began[1]
        if moved < params.LINK_SAMPLE_BYTES_MIN or seconds <= 0:
            return b"", 0
        return self._peer, max(1, int(moved / seconds))
