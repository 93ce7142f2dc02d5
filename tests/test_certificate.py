"""Whose signatures open a channel, and what proves that none ever will."""

from __future__ import annotations

import msgspec
import pytest

from protocol.certificate import certifiers, check_certified, check_cosigned, check_voided, signed_by
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.network import Network, Rules
from protocol.records import Agreement, Settlement, Void, add_signature, open_record, seal

ALICE, BOB, EVE = (SigningKey.from_seed(bytes([i]) * 32) for i in (1, 2, 3))
NOTARIES = sorted((SigningKey.from_seed(bytes([10 + i]) * 32) for i in range(4)), key=lambda key: key.public)
COURT = Network("court", Rules(), (), notaries=tuple(peer_name(key.public) for key in NOTARIES))
ALONE = Network("alone", Rules(), ())


def agreement(network: Network = COURT, *, submitter: SigningKey = ALICE, **changes: object) -> Agreement:
    fields: dict[str, object] = {f.name: bytes(32) for f in msgspec.structs.fields(Agreement)}
    numbers = ("sequence", "first_segment", "last_segment", "operations", "unit_price", "channel_micro", "lock_micro")
    fields |= dict.fromkeys((*numbers, "accept_before_ns", "segment_deadline_ns", "created_ns"), 1)
    fields |= {"check_permille": 200, "network": network.id, "submitter": submitter.public, "solver": BOB.public}
    return Agreement(**{**fields, **changes})  # type: ignore[arg-type]


def signed(record: Agreement | Settlement, *keys: SigningKey) -> bytes:
    envelope = seal(record, keys[0])
    for key in keys[1:]:
        envelope = add_signature(envelope, key, network=record.network)
    return envelope


def certified(network: Network, *keys: SigningKey, submitter: SigningKey = ALICE) -> None:
    terms = agreement(network, submitter=submitter)
    check_certified(terms, open_record(signed(terms, *keys), network=network.id)[2], network)


def test_a_quorum_of_notaries_and_both_parties_open_a_channel() -> None:
    certified(COURT, ALICE, BOB, *NOTARIES[:3])
    certified(COURT, ALICE, BOB, *NOTARIES)
    certified(ALONE, ALICE, BOB)


@pytest.mark.parametrize(
    ("network", "keys"),
    [
        (COURT, (ALICE, BOB)),
        (COURT, (ALICE, BOB, *NOTARIES[:2])),
        (COURT, (ALICE, *NOTARIES)),
        (COURT, (ALICE, BOB, EVE, *NOTARIES[:2])),
        (COURT, (ALICE, BOB, EVE, *NOTARIES)),
        (ALONE, (ALICE, BOB, NOTARIES[0])),
        (ALONE, (ALICE,)),
    ],
    ids=["no notary", "one too few", "one party", "a stranger for one", "a stranger besides", "no notaries", "half"],
)
def test_fewer_or_others_do_not(network: Network, keys: tuple[SigningKey, ...]) -> None:
    with pytest.raises(VerificationFailed):
        certified(network, *keys)


def test_a_notary_that_is_a_party_counts_as_a_party_only() -> None:
    party, *others = NOTARIES
    assert certifiers(COURT, agreement(submitter=party)) == tuple(key.public for key in others)
    certified(COURT, party, BOB, *others, submitter=party)
    with pytest.raises(VerificationFailed):
        certified(COURT, party, BOB, *others[:2], submitter=party)
    two = agreement(submitter=party, solver=others[0].public)
    assert certifiers(COURT, two) == (), "no quorum is left, and nothing opens"
    with pytest.raises(VerificationFailed):
        check_certified(two, {key.public for key in NOTARIES}, COURT)


def test_nobody_agrees_with_itself() -> None:
    with pytest.raises(VerificationFailed):
        check_cosigned(agreement(solver=ALICE.public), {ALICE.public}, COURT)


def test_no_other_record_has_more_signatures_than_parties() -> None:
    settlement = Settlement(
        network=COURT.id, agreement=bytes(32), submitter=ALICE.public, solver=BOB.public, paid_micro=0, fees=(),
        proof=bytes(32),
    )  # fmt: skip
    for keys in ((ALICE, BOB, NOTARIES[0]), (ALICE, NOTARIES[0])):
        with pytest.raises(VerificationFailed, match="no party"):
            open_record(signed(settlement, *keys), network=COURT.id)


def test_the_certificate_can_be_taken_off_and_the_id_stays() -> None:
    terms = agreement()
    whole = signed(terms, ALICE, BOB, *NOTARIES)
    half = signed_by(whole, (BOB.public, ALICE.public))
    assert half == signed(terms, ALICE, BOB)
    assert open_record(half, network=COURT.id)[1] == open_record(whole, network=COURT.id)[1]
    with pytest.raises(VerificationFailed):
        signed_by(half, (EVE.public,))


def void(key: SigningKey, of: bytes) -> bytes:
    return seal(Void(network=COURT.id, notary=key.public, agreement=of), key)


def test_a_quorum_that_never_signs_proves_that_it_never_opens() -> None:
    terms = agreement()
    name = open_record(seal(terms, ALICE), network=COURT.id)[1]
    voids = [void(key, name) for key in NOTARIES[:3]]
    check_voided(voids, name, terms, COURT)
    for few in (voids[:2], [voids[0]] * 3, [*voids[:2], void(EVE, name)], [*voids[:2], void(NOTARIES[2], bytes(32))]):
        with pytest.raises(VerificationFailed):
            check_voided(few, name, terms, COURT)
    with pytest.raises(VerificationFailed):  # one of them is a party
        check_voided(voids, name, agreement(submitter=NOTARIES[0]), COURT)
