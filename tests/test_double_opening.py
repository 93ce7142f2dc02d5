"""Two openings under one number burn a fixed part of their submitter's stake, once, on every peer and over restarts."""

from __future__ import annotations

from itertools import pairwise, permutations

import msgspec
import pytest

from market.entries import BURNED
from protocol import params
from protocol.credit_records import NO_CREDIT
from protocol.equivocation import ordered_twice, prove
from protocol.errors import LimitExceeded, VerificationFailed
from protocol.records import add_signature, open_record, seal
from tests.test_judgement import AGREEMENT, KEYS, NETWORK, STAKE_MICRO, TERMS, Disk, certified

WORD = NETWORK.rules.checker_stake_min_micro
TWINS = [seal(msgspec.structs.replace(TERMS, created_ns=number), KEYS["submitter"]) for number in range(2, 6)]


def proof(first: bytes, second: bytes, by: str = "stranger") -> bytes:
    return seal(prove(first, second, network=NETWORK.id), KEYS[by])


def test_it_burns_once_whoever_shows_it_and_with_whatever_other_opening() -> None:
    disk = Disk()
    disk.give(AGREEMENT)
    for first, second in permutations((AGREEMENT, *TWINS[:2]), 2):
        disk.give(proof(first, second, "verifier"))
        assert (disk.stake("submitter"), disk.pot(BURNED)) == (STAKE_MICRO - WORD, WORD)
    assert len(disk.settler.log) == 1 + 3, "every log keeps every pair, so they can be compared"
    posts = list(disk.posts)
    disk.settler = disk.start()
    assert disk.posts == posts and disk.stake("submitter") == STAKE_MICRO - WORD
    disk.settler.desk.ledger.check()


def test_the_record_is_the_same_whoever_publishes_it_and_whoever_else_signed_the_openings() -> None:
    one, other = proof(AGREEMENT, TWINS[0]), proof(TWINS[0], certified(TERMS), "verifier")
    assert open_record(one, network=NETWORK.id)[1] == open_record(other, network=NETWORK.id)[1]


def test_each_number_costs_a_stake_of_its_own_while_there_is_one() -> None:
    disk = Disk()
    numbers = range(10, 12 + STAKE_MICRO // WORD)
    for number in numbers:
        pair = [
            seal(msgspec.structs.replace(TERMS, sequence=number, created_ns=made), KEYS["submitter"]) for made in (1, 2)
        ]
        disk.give(proof(*pair))
    assert disk.stake("submitter") == STAKE_MICRO % WORD
    assert len(disk.settler.log) == STAKE_MICRO // WORD
    assert not disk.settler.pending, "a proof against a peer without a stake is not kept: its keys cost nothing"
    disk.settler.desk.ledger.check()


def test_proofs_without_end_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "MOOT_RECORDS_MAX", 1)
    disk = Disk()
    pairs = [*pairwise(TWINS)]
    for first, second in pairs[:2]:
        disk.give(proof(first, second))
    with pytest.raises(LimitExceeded):
        disk.give(proof(*pairs[2]))


def test_openings_on_credit_and_one_opening_twice_signed_take_nothing() -> None:
    on_credit = [
        seal(msgspec.structs.replace(TERMS, credit=bytes([9]) * 32, created_ns=made), KEYS["submitter"])
        for made in (1, 2)
    ]
    assert bytes([9]) * 32 != NO_CREDIT
    assert ordered_twice(prove(*on_credit, network=NETWORK.id)) is None
    with pytest.raises(VerificationFailed):
        Disk().give(proof(*on_credit))
    both = add_signature(seal(TERMS, KEYS["submitter"]), KEYS["solver"], network=NETWORK.id)
    with pytest.raises(VerificationFailed):
        proof(both, AGREEMENT)
