"""Money records that are wrong, one by one, and a clock that jumps between two lives: refused by name, nothing lost."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol import params
from protocol.codec import blake
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey
from protocol.records import Agreement, Claim, Settlement, Voucher, open_record, seal
from tests.test_judgement import AGREEMENT, ID, KEYS, NETWORK, SECOND, TERMS, Disk, certified, settlement
from tests.test_judgement_attacks import CHANNEL_MICRO

STRANGER = KEYS["stranger"]


def voucher(signer: SigningKey = KEYS["submitter"], **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "network": NETWORK.id, "agreement": ID, "epoch": 0, "sequence": 1, "cumulative_micro": 1_000,
        "cumulative_operations": 1, "receipt": bytes(32), "submitter": TERMS.submitter,
    } | changes  # fmt: skip
    return seal(Voucher(**fields), signer)


def claim(paper: bytes, author: str = "solver", signer: SigningKey | None = None, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "network": NETWORK.id, "agreement": ID, "author": KEYS[author].public, "voucher": paper, "fees": (),
    } | changes  # fmt: skip
    return seal(Claim(**fields), signer or KEYS[author])


OTHER_NETWORK = blake("test/money-input", b"network")
WRONG: dict[str, tuple[Any, type[IchibaError]]] = {
    "a voucher above its deposit": (lambda: claim(voucher(cumulative_micro=CHANNEL_MICRO + 1)), VerificationFailed),
    "a voucher of another network": (lambda: claim(voucher(network=OTHER_NETWORK)), WrongNetwork),
    "a claim of another network": (lambda: claim(voucher(), network=OTHER_NETWORK), WrongNetwork),
    "a voucher that a stranger signed": (lambda: claim(voucher(STRANGER)), VerificationFailed),
    "a stranger's own voucher": (
        lambda: claim(voucher(STRANGER, submitter=STRANGER.public)), VerificationFailed,
    ),
    "the solver's own voucher": (
        lambda: claim(voucher(KEYS["solver"], submitter=TERMS.solver)), VerificationFailed,
    ),
    "a voucher of another channel": (lambda: claim(voucher(agreement=blake("another"))), VerificationFailed),
    "a voucher with a changed amount": (
        lambda: claim(voucher().replace((1_000).to_bytes(2, "big"), (9_000).to_bytes(2, "big"))), VerificationFailed,
    ),
    "no voucher but bytes": (lambda: claim(b"\xc0"), MalformedRecord),
    "an agreement for a voucher": (lambda: claim(AGREEMENT), VerificationFailed),
    "a claim by a stranger": (lambda: claim(voucher(), "stranger"), VerificationFailed),
    "a claim in another's name": (lambda: claim(voucher(), signer=STRANGER), VerificationFailed),
    "a solver's claim that pays fees": (lambda: claim(voucher(), fees=((STRANGER.public, 5),)), VerificationFailed),
    "a voucher above all bounds": (
        lambda: claim(voucher(cumulative_micro=params.AMOUNT_MICRO_MAX + 1)), MalformedRecord,
    ),
    "a negative voucher": (lambda: claim(voucher(cumulative_micro=-1)), MalformedRecord),
    "a settlement above the deposit": (lambda: settlement(CHANNEL_MICRO + 1), VerificationFailed),
    "a settlement with one signature": (lambda: one_sided(), VerificationFailed),
    "an opening of nothing": (lambda: opening(channel_micro=0), VerificationFailed),
    "two openings of one number": (lambda: opening(channel_micro=5), VerificationFailed),
}  # fmt: skip


def one_sided() -> bytes:
    whole, _, _ = open_record(settlement(5), network=NETWORK.id)
    assert isinstance(whole, Settlement)
    return seal(whole, KEYS["submitter"])


def opening(**changes: Any) -> bytes:
    terms: Agreement = msgspec.structs.replace(TERMS, **changes)
    return certified(terms)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_money_record_is_refused_by_name_and_changes_nothing(name: str) -> None:
    disk = Disk()
    disk.give(AGREEMENT)
    before, log = disk.settler.desk.ledger.balances(), dict(disk.settler.log)
    made, kind = WRONG[name]
    with pytest.raises(kind) as refused:
        disk.give(made())
    assert refused.value.what
    assert (disk.settler.desk.ledger.balances(), disk.settler.log) == (before, log)
    assert disk.settler.channels[ID].best_voucher_micro == 0
    disk.give(claim(voucher(cumulative_micro=CHANNEL_MICRO)))  # what is right is taken after it
    disk.wait(3_600)
    assert disk.settler.channels[ID].paid_micro == CHANNEL_MICRO
    disk.settler.desk.ledger.check()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_vouchers_in_any_order_and_twice_pay_the_highest_once(order: tuple[int, ...]) -> None:
    disk = Disk()
    disk.give(AGREEMENT)
    papers = [claim(voucher(sequence=n, cumulative_micro=amount)) for n, amount in enumerate((1_000, 5_000, 9_000))]
    for place in (*order, *order):
        disk.give(papers[place])
    disk.wait(3_600)
    assert disk.settler.channels[ID].paid_micro == 9_000
    flow = disk.settler.desk.ledger.flows()[TERMS.submitter]
    assert flow.paid_micro == 9_000


@pytest.mark.parametrize("jump_s", [-900, -1, 0, 86_400 * 400])
def test_a_clock_that_jumps_between_two_lives_keeps_the_log_in_its_order(jump_s: int) -> None:
    """The log is folded again in the order it came, which no clock may change."""
    disk = Disk()
    disk.give(AGREEMENT)
    disk.now_ns += jump_s * SECOND
    disk.settler = disk.start()
    disk.give(settlement(5_000))
    disk.commit()
    before = disk.settler.desk.ledger.balances()
    disk.now_ns -= jump_s * SECOND
    for _ in range(2):
        disk.settler = disk.start()
        assert disk.settler.channels[ID].closed == "settled"
        assert disk.settler.desk.ledger.balances() == before
    disk.settler.desk.ledger.check()


def test_a_full_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "SETTLEMENT_LOG_MAX", 1)
    disk = Disk()
    disk.give(AGREEMENT)
    with pytest.raises(LimitExceeded, match="log is full"):
        disk.give(settlement(5))
