"""The submitter's word for a receipt, its second signature and a voucher, made ahead of the node for many at once.

Promises to change no answer: `cosign` gives what it would give without, for it is pure and Ed25519 is deterministic.
What was made ahead stays in this process until the node, having judged the receipt, asks for the very same; a word that
it does not ask for is forgotten and was never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from peer.events import Fetched, Input
from protocol import params
from protocol.codec import decode, encode
from protocol.keys import SigningKey
from protocol.lately import Lately
from protocol.records import SIGNING_DOMAIN, Envelope, Receipt, Voucher, open_record

if TYPE_CHECKING:
    from peer.submitter import Submitter

__all__ = ["Cosigning", "cosign", "cosign_ahead", "foresee"]


@dataclass(frozen=True, slots=True)
class Cosigning:
    """A receipt that may be co-signed, in its solver's envelope, with what its voucher would promise in all."""

    envelope: bytes
    receipt: Receipt
    receipt_id: bytes
    cumulative_micro: int
    operations: int  # cumulative too

    def voucher(self, submitter: bytes) -> bytes:
        """The bytes of the voucher that pays for it."""
        return encode(
            Voucher(
                network=self.receipt.network, agreement=self.receipt.agreement, epoch=0, sequence=self.receipt.sequence,
                cumulative_micro=self.cumulative_micro, cumulative_operations=self.operations, receipt=self.receipt_id,
                submitter=submitter,
            )
        )  # fmt: skip


def foresee(submitter: Submitter, inputs: Sequence[Input]) -> Callable[[], None] | None:
    """The words that `inputs` will have this peer give, to be made at once in a thread; None where they are few.

    One receipt of a deal is on its way at a time, so what its voucher will promise is known; if it comes otherwise, the
    node makes another, and this one is forgotten.
    """
    wanted = []
    network = submitter.desk.network.id
    for event in inputs:
        if not isinstance(event, Fetched) or event.error:
            continue
        deal, awaited = submitter.deals.get(event.token), submitter.receiving.waiting.get(event.token)
        if deal is None or awaited is None or awaited.blob != event.blob:
            continue
        record, receipt_id, _ = open_record(awaited.message.receipt, network=network)
        assert isinstance(record, Receipt), "the node took it for one"
        micro, operations = deal.cumulative_micro + record.amount_micro, deal.cumulative_operations + record.operations
        wanted.append(Cosigning(awaited.message.receipt, record, receipt_id, micro, operations))
    return partial(cosign_ahead, submitter.desk.key, wanted) if len(wanted) >= params.SIGNATURES_AHEAD_MIN else None


_made: Final[Lately[tuple[bytes, bytes, int, int], tuple[bytes, bytes]]] = Lately(params.COSIGNED_AHEAD_MAX)


def cosign(
    envelope: bytes, receipt: Receipt, receipt_id: bytes, key: SigningKey, *, cumulative_micro: int, operations: int
) -> tuple[bytes, bytes]:
    """The submitter's word for one receipt: its envelope with both signatures, and the voucher that pays for it.

    operations: cumulative, as the micro-credits are. Pure: it may be called in any thread.
    """
    found = _made.get((key.public, envelope, cumulative_micro, operations))
    return found or _cosigned(key, [Cosigning(envelope, receipt, receipt_id, cumulative_micro, operations)])[0]


def cosign_ahead(key: SigningKey, wanted: Sequence[Cosigning]) -> None:
    """Make what `cosign` will be asked for. Call it in a thread: other threads run while it signs."""
    by_network: dict[bytes, list[Cosigning]] = {}
    for one in wanted[: params.INPUTS_PER_COMMIT_MAX]:
        by_network.setdefault(one.receipt.network, []).append(one)
    for ours in by_network.values():
        for one, answer in zip(ours, _cosigned(key, ours), strict=True):
            _made.note((key.public, one.envelope, one.cumulative_micro, one.operations), answer)


def _cosigned(key: SigningKey, wanted: Sequence[Cosigning]) -> list[tuple[bytes, bytes]]:
    """Both words for each of receipts of one network."""
    opened = [decode(Envelope, one.envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX) for one in wanted]
    vouchers = [one.voucher(key.public) for one in wanted]
    network = wanted[0].receipt.network
    signatures = key.sign_all(SIGNING_DOMAIN, network, [*(envelope.body for envelope in opened), *vouchers])
    made = []
    for envelope, voucher, own, paid in zip(
        opened, vouchers, signatures[: len(wanted)], signatures[len(wanted) :], strict=True
    ):
        both = tuple(sorted({**dict(envelope.signatures), key.public: own}.items()))
        made.append((encode(Envelope(envelope.body, both)), encode(Envelope(voucher, ((key.public, paid),)))))
    return made
