"""Signatures computed ahead of the node, on every core, in calls of many during which all other threads run.

Promises to change no answer: it only has protocol.keys remember what is right. Whatever is wrong, malformed or of
another kind is left for the node, which finds out by itself and knows whom it costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from peer.events import GossipIn, Input, MessageIn
from peer.messages import ReceiptBack, ReceiptOffer, Records, unpack
from protocol import params
from protocol.codec import decode
from protocol.errors import RemoteProtocolError
from protocol.keys import check_of, verify_ahead
from protocol.records import SIGNING_DOMAIN, Envelope, open_record

__all__ = ["Verifier", "envelopes_in"]

SIGNATURES_MAX: Final = 2  # of an envelope: its parties'


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
        checks = [check for envelope in envelopes for check in self._checks(envelope)]
        list(self._pool.map(verify_ahead, [checks[k :: self._threads] for k in range(self._threads)]))
        for envelope in envelopes:
            try:
                open_record(envelope, network=self._network)
            except RemoteProtocolError:
                continue

    def ahead_of(self, inputs: Sequence[Input]) -> None:
        """The same for what stands in `inputs`."""
        if len(inputs) > 1:
            self.ahead(envelopes_in(inputs))

    def _checks(self, envelope: bytes) -> list[bytes]:
        """The checks that opening it takes. More signatures than parties only the node computes, for it stops at the
        first that is wrong: so nobody makes us compute more than by signing well."""
        try:
            opened = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
        except RemoteProtocolError:
            return []
        if len(opened.signatures) > SIGNATURES_MAX:
            return []
        found = (check_of(peer, SIGNING_DOMAIN, self._network, opened.body, one) for peer, one in opened.signatures)
        return [check for check in found if check is not None]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
