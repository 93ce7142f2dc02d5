"""Peers that try to move money by the order, the number and the time of settlement records."""

from __future__ import annotations

import msgspec
import pytest

from protocol.records import Claim, Voucher, open_record, seal
from tests.test_judgement import (
    AGREEMENT,
    CHANNEL_MICRO,
    ID,
    KEYS,
    LOCK_MICRO,
    NETWORK,
    STAKE_MICRO,
    TERMS,
    Disk,
    arbitration,
    challenge,
    settlement,
)


@pytest.fixture
def disk() -> Disk:
    one = Disk()
    one.give(AGREEMENT)
    return one


def claim(cumulative_micro: int, fees: tuple[tuple[bytes, int], ...] = ()) -> bytes:
    voucher = Voucher(
        network=NETWORK.id, agreement=ID, epoch=0, sequence=1, cumulative_micro=cumulative_micro,
        cumulative_operations=1, receipt=bytes(32), submitter=TERMS.submitter,
    )  # fmt: skip
    record = Claim(
        network=NETWORK.id, agreement=ID, author=TERMS.submitter, voucher=seal(voucher, KEYS["submitter"]), fees=fees
    )
    return seal(record, KEYS["submitter"])


def test_a_restart_after_a_claims_end_lets_no_cheat_escape(disk: Disk) -> None:
    disk.give(claim(4_000_000))
    disk.wait(11)
    assert disk.settler.channels[ID].closed == "claimed"
    disk.settler = disk.start()
    disk.give(arbitration("wrong"))  # before the first tick of the new process
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO
    disk.wait(61)
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO
    assert disk.free("whistleblower") > 0


def test_a_restart_after_a_claims_end_lets_no_later_voucher_count(disk: Disk) -> None:
    disk.give(claim(4_000_000))
    disk.wait(11)
    before = disk.settler.desk.ledger.balances()
    disk.settler = disk.start()
    disk.give(claim(CHANNEL_MICRO))
    disk.wait(1)
    assert disk.settler.channels[ID].closed == "claimed"
    assert disk.settler.desk.ledger.balances() == before


def test_restarts_do_not_keep_the_lock_of_a_claimed_channel(disk: Disk) -> None:
    disk.give(claim(4_000_000))
    disk.wait(11)
    for _ in range(3):
        disk.wait(25)
        disk.settler = disk.start()
        disk.wait(1)
    assert disk.stake("solver") == STAKE_MICRO


def test_records_that_waited_for_an_agreement_do_not_exhaust_the_stack() -> None:
    disk = Disk()
    waiting = [claim(0, ((KEYS["verifier"].public, micro),)) for micro in range(600)]
    for envelope in waiting:
        disk.give(envelope)
    disk.give(AGREEMENT)
    assert len(disk.settler.log) == 601


def held(disk: Disk, **changes: object) -> bytes:
    record, _, _ = open_record(challenge(), network=NETWORK.id)
    envelope = seal(msgspec.structs.replace(record, **changes), KEYS["whistleblower"])
    record, record_id, _ = open_record(envelope, network=NETWORK.id)
    disk.settler.judgement.challenged(record, record_id)
    disk.commit()
    return record_id


@pytest.mark.parametrize("changes", [{"segment": 10}, {"found_root": bytes(32), "claimed_root": bytes(32)}])
def test_a_challenge_that_no_notary_can_judge_holds_nothing(disk: Disk, changes: dict[str, object]) -> None:
    disk.give(settlement())
    held(disk, **changes)
    disk.wait(61)
    assert disk.stake("solver") == STAKE_MICRO


def test_one_challenger_holds_a_lock_once(disk: Disk) -> None:
    disk.give(settlement())
    for number in range(200):
        held(disk, created_ns=number)
        if number % 50 == 7:
            disk.settler = disk.start()
        disk.wait(600)
    assert disk.stake("solver") == STAKE_MICRO
    assert len(disk.settler.channels[ID].challenges) <= 1


def test_the_end_of_one_dispute_does_not_free_the_lock_of_another_after_a_restart(disk: Disk) -> None:
    disk.give(settlement())
    held(disk)
    disk.settler = disk.start()
    disk.give(arbitration("right", by="verifier", segment=1))
    disk.wait(100)
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO


def test_a_channel_leaves_the_walk_of_the_clock_with_its_lock_and_not_before(disk: Disk) -> None:
    """Each tick looks at the channels whose time still matters, also after a restart: a log is mostly closed ones."""
    disk.give(settlement())
    disk.wait(1)
    assert list(disk.settler._live) == [ID], "its lock has its window still"
    disk.settler = disk.start()
    disk.wait(59)
    assert disk.stake("solver") == STAKE_MICRO, "the window passed, and the restarted settler saw it"
    disk.wait(1)
    assert disk.settler._live == {}
    disk.settler = disk.start()
    disk.wait(1)
    assert disk.settler._live == {}
    assert disk.settler.channels[ID].closed == "settled"
