"""Two records of one place convict the peer that signed both; nothing else does."""

from __future__ import annotations

import msgspec
import pytest

from protocol.equivocation import check_equivocation, prove
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey
from protocol.records import Ask, seal

NETWORK = bytes(32)
CULPRIT, WITNESS = SigningKey.from_seed(bytes([1]) * 32), SigningKey.from_seed(bytes([2]) * 32)


def ask(key: SigningKey, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "network": NETWORK, "peer": key.public, "slot": 0, "sequence": 7, "roles": 1, "unit_price": 5,
        "memory_bytes": 1, "sandbox": 3, "operations_per_second": 1, "created_ns": 1, "expires_ns": 2,
    }  # fmt: skip
    return seal(Ask(**{**fields, **changes}), key)  # type: ignore[arg-type]


def test_two_asks_of_one_number_convict_their_peer() -> None:
    proof = prove(ask(CULPRIT), ask(CULPRIT, unit_price=6), network=NETWORK)
    one, two = check_equivocation(proof)
    assert proof.culprit == CULPRIT.public and {one.unit_price, two.unit_price} == {5, 6}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "second",
    [ask(CULPRIT), ask(CULPRIT, sequence=8, unit_price=6), ask(CULPRIT, slot=1), ask(WITNESS, unit_price=6)],
    ids=["the same", "a newer one", "another slot", "another peer's"],
)
def test_records_that_may_both_exist_convict_nobody(second: bytes) -> None:
    with pytest.raises(VerificationFailed):
        prove(ask(CULPRIT), second, network=NETWORK)


def test_nobody_else_can_be_named() -> None:
    proof = prove(ask(CULPRIT), ask(CULPRIT, unit_price=6), network=NETWORK)
    with pytest.raises(VerificationFailed):
        check_equivocation(msgspec.structs.replace(proof, culprit=WITNESS.public))
    with pytest.raises(VerificationFailed):
        check_equivocation(msgspec.structs.replace(proof, first=proof.second, second=proof.first))
