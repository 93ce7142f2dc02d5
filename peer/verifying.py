"""Signatures computed ahead of the node, on every core, in calls of many during which all other threads run.

Promises to change no answer: it only has protocol.keys remember what is right. Whatever is wrong, malformed or of
another kind is left for the node, which finds out by itself and knows whom it costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from peer.events import GossipIn, Input, MessageIn
from peer.messages import ReceiptBack, ReceiptOffer, Records, unpack
from protocol import params
from protocol.codec import decode
from protocol.errors import RemoteProtocolError
from protocol.keys import verify_ahead
from protocol.records import open_ahead

__all__ = ["Verifier", "envelopes_in"]


def envelopes_in(inputs: Iterable[Input]) -> list[bytes]:
    """The envelopes that come in crowds: of gossip, of receipts, of anti-entropy. Anything malformed has none."""
    found: list[bytes] = []
    for event in inputs:
        try:
            if isinstance(event, GossipIn):
                found += decode(list[bytes], event.data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX + 4096)
            elif isinstance(event, MessageIn):
                message = unpack(event.data)
                if isinstance(message, Records):
                    found += message.records
                elif isinstance(message, ReceiptOffer):
                    found.append(message.receipt)
                elif isinstance(message, ReceiptBack):
                    found += (message.receipt, message.voucher)
        except RemoteProtocolError:
            continue
    return found


class Verifier:
    """Threads that check envelopes of one network (id, 32 bytes)."""

    def __init__(self, network: bytes, *, threads: int | None = None) -> None:
        self._network = network
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="verify")

    def ahead(self, envelopes: Sequence[bytes]) -> None:
        """Compute the signatures of `envelopes`, and open them; returns when all are done. Call it in a thread."""
        if len(envelopes) < params.SIGNATURES_AHEAD_MIN:
            return
        open_ahead(envelopes, network=self._network, compute=self._compute)

    def ahead_of(self, inputs: Sequence[Input]) -> None:
        """The same for what stands in `inputs`."""
        if len(inputs) > 1:
            self.ahead(envelopes_in(inputs))

    def _compute(self, checks: list[bytes]) -> None:
        list(self._pool.map(verify_ahead, [checks[k :: self._threads] for k in range(self._threads)]))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
