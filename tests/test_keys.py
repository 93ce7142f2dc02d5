"""Keys: a signature means one thing, and a name is one key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedRecord, VerificationFailed
from protocol.keys import BASE58, SigningKey, peer_key, peer_name, short, verify

KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))
NETWORK = b"n" * 32
keys = st.binary(min_size=32, max_size=32)


def test_a_signature_verifies_for_what_it_was_made_for() -> None:
    signature = KEY.sign("ichiba/offer/1", NETWORK, b"body")
    assert len(signature) == 64
    verify(KEY.public, "ichiba/offer/1", NETWORK, b"body", signature)


@pytest.mark.parametrize(
    ("public", "domain", "network", "body"),
    [
        (OTHER.public, "ichiba/offer/1", NETWORK, b"body"),
        (KEY.public, "ichiba/offer/2", NETWORK, b"body"),
        (KEY.public, "ichiba/offer/1", b"m" * 32, b"body"),
        (KEY.public, "ichiba/offer/1", NETWORK, b"bodY"),
        # The same bytes cut elsewhere between domain, network and body.
        (KEY.public, "ichiba/offer/1n", NETWORK[1:], b"body"),
        (KEY.public, "ichiba/offer/1", NETWORK + b"b", b"ody"),
        (KEY.public[:-1], "ichiba/offer/1", NETWORK, b"body"),
        (bytes(32), "ichiba/offer/1", NETWORK, b"body"),
    ],
)
def test_a_signature_verifies_for_nothing_else(public: bytes, domain: str, network: bytes, body: bytes) -> None:
    signature = KEY.sign("ichiba/offer/1", NETWORK, b"body")
    with pytest.raises(VerificationFailed):
        verify(public, domain, network, body, signature)


@given(place=st.integers(0, 511))
def test_no_bit_of_a_signature_can_be_flipped(place: int) -> None:
    signature = bytearray(KEY.sign("d", NETWORK, b"body"))
    signature[place // 8] ^= 1 << place % 8
    with pytest.raises(VerificationFailed):
        verify(KEY.public, "d", NETWORK, b"body", bytes(signature))


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_signature_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(VerificationFailed, match=f"{length} bytes"):
        verify(KEY.public, "d", NETWORK, b"", bytes(length))


def test_names_are_libp2p_peer_ids() -> None:
    # From the libp2p peer-ids specification's encoding, computed by py-libp2p 0.8.1 for the zero key.
    assert peer_name(bytes(32)) == "12D3KooW9pNAk8aiBuGVQtWRdbkLmo5qVL3e2h5UxbN2Nz9ttwiw"
    assert short(bytes(32)) == "Nz9ttwiw"


@given(public=keys)
def test_a_name_gives_back_its_key(public: bytes) -> None:
    assert peer_name(public).startswith("12D3KooW")
    assert peer_key(peer_name(public)) == public


@given(public=keys, place=st.integers(0, 51), letter=st.sampled_from(BASE58))
def test_two_names_never_mean_one_key(public: bytes, place: int, letter: str) -> None:
    name = peer_name(public)
    changed = name[:place] + letter + name[place + 1 :]
    try:
        found = peer_key(changed)
    except MalformedRecord:
        return
    assert (found == public) == (changed == name)


@given(name=st.text(max_size=60))
def test_other_text_is_refused_with_a_next_step(name: str) -> None:
    with pytest.raises(MalformedRecord) as refused:
        peer_key(name)
    assert refused.value.next_step


def test_a_key_does_not_print_its_secret() -> None:
    assert bytes(range(32)).hex() not in repr(KEY) and peer_name(KEY.public) in repr(KEY)
