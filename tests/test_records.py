"""Signed records: one encoding, one id, and nothing gets in that is not whole."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import params
from protocol.codec import blake, decode, encode, ids_digest
from protocol.errors import (
    LimitExceeded,
    MalformedRecord,
    RemoteProtocolError,
    VerificationFailed,
    WrongNetwork,
)
from protocol.keys import SigningKey
from protocol.records import (
    Ask,
    Envelope,
    Settlement,
    Voucher,
    add_signature,
    amount_for,
    open_record,
    seal,
)

NETWORK = blake("test", b"network")
ALICE, BOB, EVE = (SigningKey.from_seed(bytes([i]) * 32) for i in (1, 2, 3))


def ask(**changes: object) -> Ask:
    fields = {
        "network": NETWORK,
        "peer": ALICE.public,
        "slot": 0,
        "sequence": 1,
        "roles": 1,
        "unit_price": 1000,
        "memory_bytes": 2**30,
        "sandbox": 4,
        "operations_per_second": 10**9,
        "created_ns": 1,
        "expires_ns": 2,
    }
    return Ask(**{**fields, **changes})  # type: ignore[arg-type]


def settlement() -> Settlement:
    return Settlement(
        network=NETWORK,
        agreement=bytes(32),
        submitter=ALICE.public,
        solver=BOB.public,
        paid_micro=5,
        fees=((EVE.public, 1),),
        proof=bytes(32),
    )


def test_a_record_comes_back_as_it_was_signed() -> None:
    record, record_id, signers = open_record(seal(ask(), ALICE), network=NETWORK)
    assert record == ask()
    assert signers == {ALICE.public}
    assert record_id == open_record(seal(ask(), ALICE), network=NETWORK)[1]


def test_two_parties_sign_one_record_and_the_id_stays() -> None:
    half = seal(settlement(), ALICE)
    whole = add_signature(half, BOB, network=NETWORK)
    assert open_record(whole, network=NETWORK)[2] == {ALICE.public, BOB.public}
    assert open_record(half, network=NETWORK)[1] == open_record(whole, network=NETWORK)[1]
    assert add_signature(whole, BOB, network=NETWORK) == whole


def test_a_stranger_cannot_sign() -> None:
    with pytest.raises(VerificationFailed, match="no party"):
        open_record(seal(settlement(), EVE), network=NETWORK)


def test_a_signature_moved_to_another_record_is_refused() -> None:
    signed = msgspec.msgpack.decode(seal(ask(), ALICE), type=Envelope)
    forged = encode(Envelope(encode(ask(unit_price=1)), signed.signatures))
    with pytest.raises(VerificationFailed):
        open_record(forged, network=NETWORK)


def test_the_same_signature_twice_is_refused() -> None:
    signed = msgspec.msgpack.decode(seal(ask(), ALICE), type=Envelope)
    with pytest.raises(MalformedRecord, match="order"):
        open_record(encode(Envelope(signed.body, signed.signatures * 2)), network=NETWORK)


def test_a_record_of_another_network_is_refused_by_name() -> None:
    with pytest.raises(WrongNetwork, match="this peer is on"):
        open_record(seal(ask(network=bytes(32)), ALICE), network=NETWORK)


def test_an_unknown_version_is_refused() -> None:
    body = encode(ask()).replace(b"ichiba/ask/1", b"ichiba/ask/9")
    signature = ALICE.sign("ichiba/record", NETWORK, body)
    with pytest.raises(MalformedRecord):
        open_record(encode(Envelope(body, ((ALICE.public, signature),))), network=NETWORK)


def test_bytes_that_do_not_reencode_to_themselves_are_refused() -> None:
    body = encode(ask(slot=5))
    index = body.index(b"\x05", body.index(ALICE.public) + 32)
    longer = body[:index] + b"\xcd\x00\x05" + body[index + 1 :]  # the same 5 as a 16-bit integer
    with pytest.raises(MalformedRecord, match="canonical"):
        decode(Ask, longer, bytes_max=10_000)


def test_an_oversize_record_is_refused_before_it_is_read() -> None:
    with pytest.raises(LimitExceeded):
        open_record(bytes(params.GOSSIP_RECORD_BYTES_MAX + 1), network=NETWORK)


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_our_errors(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_record(data, network=NETWORK)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.sampled_from(["flip", "cut", "insert"]))
def test_a_damaged_record_is_refused_or_is_the_same_record(at: int, noise: bytes, how: str) -> None:
    data = seal(settlement(), ALICE)
    at %= len(data)
    damaged = {
        "flip": data[:at] + bytes([data[at] ^ noise[0]]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + noise + data[at:],
    }[how]
    if damaged == data:
        return
    with pytest.raises(RemoteProtocolError):
        open_record(damaged, network=NETWORK)


@given(st.integers(0, 2**60), st.integers(0, 10**12))
def test_amounts_round_in_the_payers_favour(operations: int, price: int) -> None:
    amount = amount_for(operations, price)
    assert amount * 10**9 <= operations * price < (amount + 1) * 10**9


def test_the_digest_of_a_set_of_ids_ignores_order_and_sees_each_member() -> None:
    ids = [blake("id", bytes([i])) for i in range(5)]
    assert ids_digest(ids) == ids_digest(reversed(ids))
    assert ids_digest(ids) != ids_digest(ids[1:])


def test_amounts_beyond_the_limit_are_no_record() -> None:
    big = Voucher(
        network=NETWORK,
        agreement=bytes(32),
        epoch=0,
        sequence=0,
        cumulative_micro=params.AMOUNT_MICRO_MAX + 1,
        cumulative_operations=0,
        receipt=bytes(32),
        submitter=ALICE.public,
    )
    with pytest.raises(MalformedRecord):
        open_record(seal(big, ALICE), network=NETWORK)


def test_another_msgpack_library_reads_the_same_record() -> None:
    body = encode(settlement())
    fields = msgpack.unpackb(body, use_list=True)
    assert fields[:2] == ["ichiba/settlement/1", NETWORK]
    assert fields[5] == settlement().paid_micro
    assert msgpack.packb(fields, use_bin_type=True) == body
