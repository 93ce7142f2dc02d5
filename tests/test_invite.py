"""Invites: what is decoded is what was encoded, and a typo never leads anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.addresses import parse_address
from peer.invite import LETTERS, BadInvite, decode_invite, encode_invite
from protocol.errors import LocalProtocolError, MalformedRecord, WrongNetwork
from protocol.keys import SigningKey, peer_name

NETWORK = bytes(range(32))
PEER = SigningKey.from_seed(b"i" * 32).public
ADDRESSES = [f"/ip4/192.0.2.7/tcp/4001/p2p/{peer_name(PEER)}", f"/ip6/2001:db8::1/tcp/4001/p2p/{peer_name(PEER)}"]
INVITE = encode_invite(NETWORK, ADDRESSES)


def test_an_invite_reads_back() -> None:
    invite = decode_invite(INVITE, network=NETWORK)
    assert invite.network == NETWORK and invite.peer == PEER and invite.addresses == ADDRESSES
    assert INVITE.startswith("ichiba1") and INVITE.islower()


def test_line_breaks_blanks_and_capitals_do_not_matter() -> None:
    spread = " ".join(INVITE[i : i + 10] for i in range(0, len(INVITE), 10)) + "\n"
    assert decode_invite(spread) == decode_invite(INVITE.upper()) == decode_invite(INVITE)


@given(
    network=st.binary(min_size=32, max_size=32),
    seed=st.binary(min_size=32, max_size=32),
    hosts=st.lists(st.ip_addresses(v=4).map(str), min_size=1, max_size=6, unique=True),
    port=st.integers(1, 65_535),
)
def test_every_invite_reads_back(network: bytes, seed: bytes, hosts: list[str], port: int) -> None:
    name = peer_name(SigningKey.from_seed(seed).public)
    addresses = [str(parse_address(f"/ip4/{host}/tcp/{port}/p2p/{name}")) for host in hosts if host != "0.0.0.0"]
    if not addresses:
        return
    invite = decode_invite(encode_invite(network, addresses))
    assert invite.network == network and set(invite.addresses) <= set(addresses) and len(invite.addresses) <= 4


@given(place=st.integers(0, len(INVITE) - 1), letter=st.sampled_from(LETTERS + "1bio?-"))
def test_no_letter_can_be_mistyped(place: int, letter: str) -> None:
    typo = INVITE[:place] + letter + INVITE[place + 1 :]
    if typo != INVITE:
        with pytest.raises(BadInvite) as refused:
            decode_invite(typo)
        assert refused.value.why and refused.value.next_step


@given(place=st.integers(0, len(INVITE) - 2))
def test_no_two_letters_can_be_swapped(place: int) -> None:
    swapped = INVITE[:place] + INVITE[place + 1] + INVITE[place] + INVITE[place + 2 :]
    if swapped != INVITE:
        with pytest.raises(BadInvite):
            decode_invite(swapped)


@given(length=st.integers(0, len(INVITE) - 1))
def test_an_invite_cut_off_is_refused(length: int) -> None:
    with pytest.raises(BadInvite):
        decode_invite(INVITE[:length])


@given(text=st.text(max_size=100))
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(BadInvite):
        decode_invite("ichiba1" + text)


def test_endless_text_is_refused_at_once() -> None:
    with pytest.raises(BadInvite, match="letters"):
        decode_invite("ichiba1" + "q" * 10_000)


def test_an_invite_to_another_network_says_so() -> None:
    with pytest.raises(WrongNetwork):
        decode_invite(INVITE, network=bytes(32))


def test_loopback_is_left_out_unless_it_is_all_there_is() -> None:
    loopback = f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_name(PEER)}"
    assert decode_invite(encode_invite(NETWORK, [loopback, *ADDRESSES])).addresses == ADDRESSES
    assert decode_invite(encode_invite(NETWORK, [loopback])).addresses == [loopback]


@pytest.mark.parametrize("addresses", [[], ["/ip4/1.2.3.4/tcp/1"], [f"/ip4/0.0.0.0/tcp/1/p2p/{peer_name(PEER)}"]])
def test_nobody_is_invited_to_nowhere(addresses: list[str]) -> None:
    with pytest.raises(LocalProtocolError) as refused:
        encode_invite(NETWORK, addresses)
    assert refused.value.next_step


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "/ip4/1.2.3.4", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3/tcp/1", "/ip4/01.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/01",
        "/ip4/1.2.3.4/tcp/65536", "/ip4/1.2.3.4/tcp/-1", "/ip6/::0/tcp/1", "/ip6/1.2.3.4/tcp/1", "/dns/-x/tcp/1",
        "/dns/A/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/x", "/ip4/1.2.3.4/tcp/1/p2p", "/ip4/1.2.3.4/tcp/1/ws/x",
        "/ip4/1.2.3.4/tcp/1\n", "x" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(MalformedRecord):
        parse_address(text)


@pytest.mark.parametrize("text", ["/dns4/a.example/tcp/0", "/ip6/::1/tcp/9", ADDRESSES[0]])
def test_an_address_has_one_spelling(text: str) -> None:
    assert str(parse_address(text)) == text
