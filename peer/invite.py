"""Invites: one word that brings a newcomer into a network, for chat windows, paper and telephones.

`ichiba1` and then bech32 letters (BIP-173: lower case, no 1, b, i, o) with the stronger checksum of BIP-350, so that
a typo is found and named instead of leading to another network. Pure. Holds the network id and up to four
addresses; refuses to hold secrets: an invite may be published.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from peer.addresses import Address, parse_address
from protocol import params
from protocol.codec import Digest, decode, encode
from protocol.errors import IchibaError, LocalProtocolError, RemoteProtocolError, WrongNetwork

__all__ = ["BadInvite", "Invite", "decode_invite", "encode_invite"]

PREFIX: Final = "ichiba"
LETTERS: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
VALUE: Final = {letter: value for value, letter in enumerate(LETTERS)}
GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)  # BIP-173
BECH32M: Final = 0x2BC830A3  # BIP-350: finds inserted and deleted letters too
CHECKSUM_LETTERS: Final = 6
INVITE_CHARS_MAX: Final = 2000
PAYLOAD_BYTES_MAX: Final = 1200


class BadInvite(IchibaError):
    """A text that is no invite: mistyped, cut off, or something else."""

    code = "bad-invite"
    exit_code = 2


class _Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    kind: str
    host: Annotated[str, msgspec.Meta(max_length=253)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class Invite(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """`network` is the 32-byte network id, `peer` the inviter's key, `places` where it listens."""

    network: Digest
    peer: Digest
    places: Annotated[tuple[_Place, ...], msgspec.Meta(min_length=1, max_length=params.ANNOUNCED_ADDRESSES_MAX)]

    @property
    def addresses(self) -> list[str]:
        """Full multiaddrs, for `Host.connect`."""
        return [str(Address(place.kind, place.host, place.port, self.peer)) for place in self.places]


def encode_invite(network: bytes, addresses: list[str]) -> str:
    """The invite of a peer that listens at `addresses` (full multiaddrs of one peer).

    At most four are held; addresses that only this machine reaches are left out if there are others. Raises
    LocalProtocolError if there is none.
    """
    places = [parse_address(text) for text in addresses]
    usable = [place for place in places if place.port and not place.wildcard]
    chosen = ([place for place in usable if not place.loopback] or usable)[: params.ANNOUNCED_ADDRESSES_MAX]
    if not chosen or chosen[0].peer is None or any(place.peer != chosen[0].peer for place in chosen):
        raise LocalProtocolError(
            "no address to invite to", why="this peer listens nowhere", next_step="start it with --listen ADDRESS"
        )
    invite = Invite(network, chosen[0].peer, tuple(_Place(p.kind, p.host, p.port) for p in chosen))
    values = _regroup(encode(invite), 8, 5)
    return f"{PREFIX}1" + "".join(LETTERS[value] for value in values + _checksum(values))


def decode_invite(text: str, *, network: bytes | None = None) -> Invite:
    """The invite in `text`; blanks and line breaks in it do not matter, nor does its case.

    Raises BadInvite for typos and truncation, WrongNetwork if it leads to another network than `network`.
    """
    word = "".join(text.split())
    if word != word.lower() and word != word.upper():
        raise _bad("it mixes capital and small letters")
    word = word.lower()
    if len(word) > INVITE_CHARS_MAX:
        raise _bad(f"it has {len(word)} letters")
    if not word.startswith(f"{PREFIX}1"):
        raise _bad(f"it does not begin with {PREFIX}1")
    body = word[len(PREFIX) + 1 :]
    wrong = [place for place, letter in enumerate(body, len(PREFIX) + 2) if letter not in VALUE]
    if wrong:
        raise _bad(f"letter {wrong[0]}, {word[wrong[0] - 1]!r}, occurs in no invite")
    values = [VALUE[letter] for letter in body]
    if len(values) <= CHECKSUM_LETTERS or _polymod(_spread() + values) != BECH32M:
        raise _bad("its checksum does not fit: a letter is wrong or missing")
    try:
        payload = bytes(_regroup_back(values[:-CHECKSUM_LETTERS]))
        invite = decode(Invite, payload, bytes_max=PAYLOAD_BYTES_MAX)
        for address in invite.addresses:
            parse_address(address)
    except RemoteProtocolError as fault:
        raise _bad(f"its checksum fits but its content does not ({fault.what})") from None
    if network is not None and invite.network != network:
        raise WrongNetwork(
            f"an invite to network {invite.network.hex()[:12]}, this peer is in {network.hex()[:12]}",
            next_step="ask for an invite to your network, or start a second peer with that network's file",
        )
    return invite


def _bad(why: str) -> BadInvite:
    return BadInvite("this is no invite", why=why, next_step="copy it again, whole, from `ichiba invite`")


def _regroup(data: bytes, from_bits: int, to_bits: int) -> list[int]:
    """Cut bytes into 5-bit values, the last padded with zeros (BIP-173)."""
    number, bits, values = 0, 0, []
    for byte in data:
        number, bits = number << from_bits | byte, bits + from_bits
        while bits >= to_bits:
            bits -= to_bits
            values.append(number >> bits)
            number &= (1 << bits) - 1
    return values + ([number << (to_bits - bits)] if bits else [])


def _regroup_back(values: list[int]) -> list[int]:
    """The bytes of 5-bit values. Raises BadInvite if the padding is no padding, so that an invite has one spelling."""
    number, bits, data = 0, 0, []
    for value in values:
        number, bits = number << 5 | value, bits + 5
        if bits >= 8:
            bits -= 8
            data.append(number >> bits)
            number &= (1 << bits) - 1
    if bits >= 5 or number:
        raise _bad("its last letter does not fit")
    return data


def _spread() -> list[int]:
    return [ord(letter) >> 5 for letter in PREFIX] + [0] + [ord(letter) & 31 for letter in PREFIX]


def _checksum(values: list[int]) -> list[int]:
    rest = _polymod(_spread() + values + [0] * CHECKSUM_LETTERS) ^ BECH32M
    return [rest >> 5 * (CHECKSUM_LETTERS - 1 - place) & 31 for place in range(CHECKSUM_LETTERS)]


def _polymod(values: list[int]) -> int:
    """The BCH code of BIP-173 over GF(32)."""
    rest = 1
    for value in values:
        top = rest >> 25
        rest = (rest & 0x1FFFFFF) << 5 ^ value
        for bit in range(5):
            rest ^= GENERATOR[bit] if top >> bit & 1 else 0
    return rest
