"""How the daemon's side of a unit reaches the other units of its run: one small port.

Whoever runs a unit (peer/workshop.py) asks for payloads and hands payloads over by their keys, and knows nothing of
links. Adapters: peer/tensor_links.py over libp2p, and one in memory for tests.
"""

from __future__ import annotations

from typing import Protocol

from protocol.payload import PayloadKey

__all__ = ["StagePort"]


class StagePort(Protocol):
    """The payloads of one unit, out and in."""

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        """Take `payload` for the units `others`; return once it is queued, which may wait for others to take theirs.

        A key that was sent before is dropped: a worker that starts again sends the same bits again. The queue of a
        link must hold what a unit sends before it needs its next payload, or two units wait for each other for ever:
        the micro-batches in flight of `forward` and `backward`, a whole step's of `sync`, a segment's of `outer`.
        """
        ...

    async def want(self, key: PayloadKey) -> bytes:
        """The payload `key`, when it is there, which may take long. A key may be asked for again."""
        ...
