"""Signatures computed ahead: the same answers, each computed once, and nothing wrong remembered."""

from __future__ import annotations

import pytest

from peer.events import GossipIn, MessageIn, Tick
from peer.messages import ReceiptOffer, Records, pack
from peer.verifying import Verifier, envelopes_in
from protocol import keys, params, records
from protocol.codec import blake, encode
from protocol.errors import RemoteProtocolError, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey, Verified, verify
from protocol.lately import Lately
from protocol.records import Ask, open_record, seal

KEY, OTHER = SigningKey.from_seed(b"\3" * 32), SigningKey.from_seed(b"\4" * 32)
NETWORK = blake("test/verifying", b"network")


def asks(count: int) -> list[bytes]:
    return [
        seal(
            Ask(
                network=NETWORK, peer=KEY.public, slot=0, sequence=n, roles=1, unit_price=1, memory_bytes=1, sandbox=4,
                operations_per_second=1, created_ns=1, expires_ns=2,
            ),
            KEY,
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> Verified:
    fresh = Verified()
    monkeypatch.setattr(keys, "verified", fresh)
    records._opened.clear()
    return fresh


def forget(memory: Verified) -> None:
    memory._new.clear()
    memory._old.clear()


def test_each_signature_is_computed_once(nothing_is_remembered: Verified) -> None:
    envelopes = asks(20)
    forget(nothing_is_remembered)  # whoever makes a signature need not compute it again either
    verifier = Verifier(NETWORK, threads=2)
    verifier.ahead([*envelopes, b"rubbish", envelopes[0][:-1] + b"x"])
    counted = (nothing_is_remembered.computed, nothing_is_remembered.remembered)
    assert counted == (20, 0)
    for envelope in envelopes:
        assert open_record(envelope, network=NETWORK)[2] == {KEY.public}
    assert (nothing_is_remembered.computed, nothing_is_remembered.remembered) == counted, "nor is one opened twice"
    with pytest.raises(VerificationFailed):
        open_record(envelopes[0][:-1] + bytes([envelopes[0][-1] ^ 1]), network=NETWORK)
    verifier.close()


def test_what_is_remembered_is_the_whole_check(nothing_is_remembered: Verified) -> None:
    signature = KEY.sign("domain", NETWORK, b"body")
    verify(KEY.public, "domain", NETWORK, b"body", signature)
    for public, domain, network, body, changed in (
        (OTHER.public, "domain", NETWORK, b"body", signature), (KEY.public, "other", NETWORK, b"body", signature),
        (KEY.public, "domain", bytes(32), b"body", signature), (KEY.public, "domain", NETWORK, b"bodY", signature),
        (KEY.public, "domain", NETWORK, b"body", bytes(64)),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(VerificationFailed):
                verify(public, domain, network, body, changed)
    assert nothing_is_remembered.computed == 0


def test_the_memory_is_bounded_and_the_latest_stay(
    nothing_is_remembered: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "SIGNATURES_REMEMBERED_MAX", 10)
    checks = [n.to_bytes(128, "big") for n in range(100)]
    for check in checks:
        nothing_is_remembered.add(check)
        assert len(nothing_is_remembered._new) + len(nothing_is_remembered._old) <= 10
    assert all(nothing_is_remembered.knows(check) for check in checks[-5:])
    assert not nothing_is_remembered.knows(checks[0])


def test_what_is_opened_once_is_the_whole_envelope_of_one_network() -> None:
    (envelope,) = asks(1)
    once = open_record(envelope, network=NETWORK)
    assert open_record(bytes(bytearray(envelope)), network=NETWORK) is once
    with pytest.raises(WrongNetwork):
        open_record(envelope, network=blake("test/verifying", b"another"))
    for at in range(len(envelope)):
        with pytest.raises(RemoteProtocolError):
            open_record(envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :], network=NETWORK)


def test_a_large_envelope_is_opened_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "OPENED_BYTES_MAX", 100)
    (envelope,) = asks(1)
    assert open_record(envelope, network=NETWORK) is not open_record(envelope, network=NETWORK)


def test_the_latest_answers_stay_and_their_number_is_bounded() -> None:
    lately: Lately[int, int] = Lately(10)
    for n in range(100):
        lately.note(n, -n)
        assert [lately.get(k) for k in range(max(0, n - 4), n + 1)] == [-k for k in range(max(0, n - 4), n + 1)]
        assert sum(lately.get(k) is not None for k in range(n + 1)) <= 10
    lately.clear()
    assert lately.get(99) is None


def test_envelopes_are_found_where_they_come_in_crowds() -> None:
    one, two, three = asks(3)
    inputs = [
        Tick(), GossipIn(KEY.public, "market", encode([one])), GossipIn(KEY.public, "market", b"\xff"),
        MessageIn(KEY.public, pack(Records((two,)))), MessageIn(KEY.public, pack(ReceiptOffer(three))),
        MessageIn(KEY.public, b""),
    ]  # fmt: skip
    assert envelopes_in(inputs) == [one, two, three]
