"""The tolerance of an agreement follows from signed profiles, and what does not follow is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol import params
from protocol.errors import LimitExceeded, RemoteProtocolError
from protocol.keys import SigningKey
from protocol.profile import EXACT, Gauge, Tolerance, tolerance_id
from protocol.records import Reveal, seal
from protocol.tolerance import open_profiles, open_tolerance
from tests.test_profile import profile_of

KEYS = [SigningKey.from_seed(bytes([number]) * 32) for number in range(1, 8)]
NETWORK, TASK = bytes(32), bytes(32)
GAUGES = (Gauge("bias", 3, (1,)),)
REVEAL = Reveal(network=NETWORK, agreement=TASK, proof=TASK, author=KEYS[1].public, seed=TASK)


def sealed(number: int, l1_ppb: int = 2000, **fields: Any) -> bytes:
    """A profile of verifier `number`, signed by it."""
    given = {"verifier": KEYS[number].public, "gauges": GAUGES, **fields}
    return seal(msgspec.structs.replace(profile_of(l1_ppb), **given), KEYS[number])


def opened(profiles: list[bytes], expected: Tolerance) -> Tolerance | None:
    return open_tolerance(profiles, network=NETWORK, task=TASK, expected=tolerance_id(expected))


def test_the_tolerance_is_what_the_profiles_give() -> None:
    expected = Tolerance(6000, 30_000, GAUGES)
    assert opened([sealed(0), sealed(1, 3000)], expected) == expected
    assert open_tolerance([], network=NETWORK, task=TASK, expected=EXACT) is None
    assert len({tolerance_id(expected), tolerance_id(Tolerance(6000, 30_001, GAUGES)), EXACT}) == 3


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "give no tolerance"),
        ([sealed(0)], "give no tolerance"),
        ([sealed(0), sealed(1, 100_000)], "give no tolerance"),
        ([sealed(0), sealed(1, gauges=())], "give no tolerance"),
        ([sealed(0), sealed(0, 2500)], "two profiles of one verifier"),
        ([sealed(0, 4000), sealed(1, 5000)], "another tolerance"),
        ([sealed(0), sealed(1, task=bytes([1]) * 32)], "another task"),
        ([sealed(0), sealed(1, mode="exact", measured=(), gauges=(), other_seed_ppb=0)], "exact work"),
        ([sealed(0), sealed(1, verifier=KEYS[2].public)], "no party"),
        ([sealed(0), sealed(1, network=bytes([1]) * 32)], "network"),
        ([sealed(0), sealed(1, seeds=(1,))], "one seed"),
        ([sealed(0), b"\x90"], "not a|invalid|Expected"),
        ([sealed(0), seal(REVEAL, KEYS[1])], "signed by their verifiers"),
    ],
)  # fmt: skip
def test_what_does_not_give_it_is_refused(profiles: list[bytes], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        opened(profiles, Tolerance(6000, 30_000, GAUGES))


def test_profiles_beside_exact_work_and_too_many_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="exact work"):
        open_tolerance([sealed(0), sealed(1)], network=NETWORK, task=TASK, expected=EXACT)
    many = [sealed(number) for number in range(params.PROFILES_KEPT_MAX + 1)]
    with pytest.raises(LimitExceeded):
        open_profiles(many, network=NETWORK, task=TASK)
