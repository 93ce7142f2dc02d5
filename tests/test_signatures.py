"""Signatures checked and made by the many are those of libsodium one by one, compiled or not."""

from __future__ import annotations

import shutil

import nacl.bindings
import nacl.exceptions
import pytest

from protocol import keys, signatures
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, Verified, check_of, verify, verify_ahead
from protocol.signatures import check_many, make_many, signatures_library

KEYS = [SigningKey.from_seed(bytes([n]) * 32) for n in range(3)]
ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.fixture(params=["compiled", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(signatures, "signatures_library", lambda: None)
    elif signatures_library() is None:
        pytest.skip("no C compiler: there is nothing to compare")
    return str(request.param)


def test_the_loops_are_built_where_there_is_a_compiler() -> None:
    assert signatures_library() is not None or shutil.which("cc") is None, "run setup.sh: a compiler is here"


def is_right(check: bytes) -> bool:
    try:
        nacl.bindings.crypto_sign_open(check[32:], check[:32])
    except nacl.exceptions.BadSignatureError:
        return False
    return True


def checks() -> list[bytes]:
    """Right ones, each of their bytes' neighbours wrong in turn, and the encodings that libsodium must refuse."""
    found = []
    for n, key in enumerate(KEYS):
        message = blake("test", bytes([n]))
        found.append(key.public + nacl.bindings.crypto_sign(message, key._secret))
    right = found[0]
    found += [right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :] for at in range(0, 128, 5)]
    scalar = int.from_bytes(right[64:96], "little") + ORDER  # the same scalar, not reduced
    found.append(right[:64] + scalar.to_bytes(32, "little") + right[96:])
    for small in (bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"):  # keys of small order
        found.append(small + b"\1" + bytes(31) + bytes(32) + right[96:])
    return [*found, *found[:3]]


def test_each_answer_is_that_of_the_signature_alone(way: str) -> None:
    asked = checks()
    assert check_many(asked) == [is_right(check) for check in asked]
    assert sum(check_many(asked)) == 6
    assert check_many([]) == []


def test_signatures_made_together_are_those_made_alone(way: str) -> None:
    messages = [blake("test", bytes([n])) for n in range(5)]
    secret = KEYS[1]._secret
    assert make_many(secret, messages) == [nacl.bindings.crypto_sign(one, secret)[:64] for one in messages]
    assert make_many(secret, []) == []
    bodies = [b"a", b"bb", b""]
    assert KEYS[2].sign_all("domain", bytes(32), bodies) == [KEYS[2].sign("domain", bytes(32), body) for body in bodies]


def test_only_what_is_right_is_remembered(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, network = KEYS[0], bytes(32)
    signature = key.sign("domain", network, b"body")
    fresh = Verified()
    monkeypatch.setattr(keys, "verified", fresh)
    wrong = signature[:-1] + bytes([signature[-1] ^ 1])
    pairs = [check_of(key.public, "domain", network, b"body", one) for one in (signature, wrong, signature)]
    verify_ahead(pairs)
    assert fresh.computed == 1
    verify(key.public, "domain", network, b"body", signature)
    assert (fresh.computed, fresh.remembered) == (1, 1)
    with pytest.raises(VerificationFailed):
        verify(key.public, "domain", network, b"body", wrong)
