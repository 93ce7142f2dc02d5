"""A submitter's word made ahead is the word it would give, to the byte, and is given only where the node asks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peer import cosigning
from peer.cosigning import Cosigning, cosign, cosign_ahead, foresee
from peer.events import Fetched, Tick
from peer.messages import ReceiptOffer
from peer.receiving import Awaited
from protocol import keys, params
from protocol.codec import blake
from protocol.keys import SigningKey
from protocol.records import Receipt, Voucher, open_record, seal

SOLVER, SUBMITTER = SigningKey.from_seed(b"\5" * 32), SigningKey.from_seed(b"\6" * 32)
NETWORK = blake("test/cosigning", b"network")


def receipt(n: int) -> tuple[bytes, Receipt, bytes]:
    """A receipt of the deal n in its solver's envelope, opened."""
    root = blake("test/root", bytes([n]))
    envelope = seal(
        Receipt(
            network=NETWORK, agreement=blake("test/deal", bytes([n])), sequence=0, previous=root, segment=0,
            operations=10, amount_micro=7, in_root=root, out_root=root, losses_root=root, checkpoint=root,
            checkpoint_bytes=1, done_ns=1,
        ),
        SOLVER,
    )  # fmt: skip
    record, record_id, _ = open_record(envelope, network=NETWORK)
    assert isinstance(record, Receipt)
    return envelope, record, record_id


@pytest.fixture(autouse=True)
def nothing_was_made() -> None:
    cosigning._made.clear()


def signing_is_a_failure(*_: object) -> Any:
    pytest.fail("this was signed before")


def test_what_was_made_ahead_is_what_the_node_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [receipt(n) for n in range(9)]
    plain = [cosign(*one, SUBMITTER, cumulative_micro=7 + n, operations=10) for n, one in enumerate(offered)]
    cosign_ahead(SUBMITTER, [Cosigning(*one, 7 + n, 10) for n, one in enumerate(offered)])
    with monkeypatch.context() as patch:
        patch.setattr(keys, "make_many", signing_is_a_failure)
        ahead = [cosign(*one, SUBMITTER, cumulative_micro=7 + n, operations=10) for n, one in enumerate(offered)]
    assert ahead == plain
    for n, ((both, voucher), (_, _, receipt_id)) in enumerate(zip(ahead, offered, strict=True)):
        assert open_record(both, network=NETWORK)[2] == {SOLVER.public, SUBMITTER.public}
        promise, _, signers = open_record(voucher, network=NETWORK)
        assert isinstance(promise, Voucher)
        assert (promise.cumulative_micro, promise.receipt, signers) == (7 + n, receipt_id, {SUBMITTER.public})


def test_another_sum_is_another_word() -> None:
    one = receipt(1)
    cosign_ahead(SUBMITTER, [Cosigning(*one, 7, 10)])
    _, voucher = cosign(*one, SUBMITTER, cumulative_micro=8, operations=10)
    promise = open_record(voucher, network=NETWORK)[0]
    assert isinstance(promise, Voucher)
    assert promise.cumulative_micro == 8


def submitter_of(awaited: dict[bytes, Awaited]) -> Any:
    return SimpleNamespace(
        desk=SimpleNamespace(key=SUBMITTER, network=SimpleNamespace(id=NETWORK)),
        deals={deal: SimpleNamespace(cumulative_micro=100, cumulative_operations=1000) for deal in awaited},
        receiving=SimpleNamespace(waiting=awaited),
    )


def test_fetched_checkpoints_foretell_the_words_for_their_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [receipt(n) for n in range(params.SIGNATURES_AHEAD_MIN)]
    submitter = submitter_of(
        {one.agreement: Awaited(one.checkpoint, ReceiptOffer(data), one) for data, one, _ in offered}
    )
    here = [Fetched(one.checkpoint, one.agreement) for _, one, _ in offered]
    assert foresee(submitter, here[1:]) is None, "too few"
    for odd in (Fetched(here[0].blob, here[0].token, error="lost"), Fetched(bytes(32), here[0].token), Tick()):
        assert foresee(submitter, [odd, *here[1:]]) is None
    assert foresee(submitter, [Fetched(bytes(32), b"no deal".ljust(32)), *here[1:]]) is None
    work = foresee(submitter, here)
    assert work is not None
    work()
    monkeypatch.setattr(keys, "make_many", signing_is_a_failure)
    for one in offered:
        cosign(*one, SUBMITTER, cumulative_micro=107, operations=1010)
