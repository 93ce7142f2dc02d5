"""Peer keys: Ed25519 signatures that mean one thing in one network, and the names people see.

Promises: a signature made under one domain or network verifies under no other; a peer's name is its libp2p
peer id, so the key that signs records is the key that opens connections. Refuses to know where seeds lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import nacl.bindings
import nacl.exceptions
import nacl.public
import nacl.signing

from protocol import params
from protocol.codec import blake
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.signatures import check_many, make_many

__all__ = [
    "SigningKey", "are_right", "check_of", "peer_key", "peer_name", "short", "verified", "verify", "verify_ahead",
]  # fmt: skip

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
# libp2p peer-ids spec: an Ed25519 key is the *identity* multihash (code 0x00, length 0x24) of the protobuf
# PublicKey {Type: Ed25519 (field 1, varint 1), Data: 32 bytes (field 2)}; its text is base58btc.
PEER_ID_PREFIX: Final = bytes.fromhex("002408011220")
BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BASE58_VALUE: Final = {letter: value for value, letter in enumerate(BASE58)}
NAME_CHARS: Final = 52  # every id of this prefix has the one leading "1" of its zero byte and 51 digits
SHORT_CHARS: Final = 8  # 46 bits: enough to tell a swarm's peers apart, never used to decide anything


class SigningKey:
    """One peer's secret key. It never prints itself."""

    def __init__(self, key: nacl.signing.SigningKey) -> None:
        self._key = key
        self.public: bytes = bytes(key.verify_key)
        self._secret = bytes(key) + self.public  # libsodium's form of a secret key, which its bindings take

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """The key of a 32-byte seed. Raises ValueError for another length: a seed is ours, never a peer's."""
        if len(seed) != KEY_BYTES:
            raise ValueError(f"a seed has {KEY_BYTES} bytes, got {len(seed)}")
        return cls(nacl.signing.SigningKey(seed))

    def sign(self, domain: str, network: bytes, body: bytes) -> bytes:
        """64 bytes: Ed25519 (RFC 8032) over BLAKE2b-256 of domain, network id and body."""
        message = _message(domain, network, body)
        signature: bytes = nacl.bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES]
        verified.note(self.public + signature + message)
        return signature

    def sign_all(self, domain: str, network: bytes, bodies: Sequence[bytes]) -> list[bytes]:
        """`sign` of each body, in one call during which other threads run."""
        messages = [_message(domain, network, body) for body in bodies]
        signatures = make_many(self._secret, messages)
        for signature, message in zip(signatures, messages, strict=True):
            verified.note(self.public + signature + message)
        return signatures

    def open_box(self, box: bytes) -> bytes:
        """What a sealed box (protocol.sealing.box_for) to this key holds. Raises VerificationFailed."""
        try:
            return nacl.public.SealedBox(self._key.to_curve25519_private_key()).decrypt(box)
        except (nacl.exceptions.CryptoError, ValueError, TypeError):
            raise VerificationFailed(
                f"a box of {len(box)} bytes does not open", why="it is damaged, or was sealed to another peer's key"
            ) from None

    def __repr__(self) -> str:
        return f"SigningKey(public={peer_name(self.public)})"


def verify(public: bytes, domain: str, network: bytes, body: bytes, signature: bytes) -> None:
    """Return if `signature` (64 bytes) is `public`'s over this domain, network and body.

    Raises VerificationFailed otherwise, wrong lengths included. libsodium refuses small-order keys and
    non-canonical encodings, so no signature fits two messages and a stranger cannot alter a valid one.
    """
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise VerificationFailed(
            f"a key of {len(public)} and a signature of {len(signature)} bytes",
            why=f"Ed25519 keys have {KEY_BYTES} bytes and signatures {SIGNATURE_BYTES}",
        )
    message = _message(domain, network, body)
    if verified.knows(public + signature + message):
        return
    try:
        nacl.bindings.crypto_sign_open(signature + message, public)
    except nacl.exceptions.BadSignatureError:
        raise VerificationFailed(
            f"the {domain} signature of {short(public)} does not verify",
            why="it is forged, or made for another domain, network or body",
        ) from None
    verified.add(public + signature + message)


def check_of(public: bytes, domain: str, network: bytes, body: bytes, signature: bytes) -> bytes:
    """The check that `verify` makes of a key (32 bytes) and a signature (64 bytes), for `verify_ahead`."""
    assert len(public) + len(signature) == KEY_BYTES + SIGNATURE_BYTES
    return public + signature + _message(domain, network, body)


def verify_ahead(checks: Sequence[bytes]) -> None:
    """Compute checks (of `check_of`) in one call during which other threads run, so that `verify` need not. Those that
    are wrong are left for it to find."""
    new = [check for check in dict.fromkeys(checks) if not verified.remembers(check)]
    for check, right in zip(new, check_many(new), strict=True):
        if right:
            verified.add(check)


def are_right(checks: Sequence[bytes]) -> bool:
    """Whether all of them were found right lately."""
    return all(verified.remembers(check) for check in checks)


class Verified:
    """The signatures last found right, so that none is computed twice: a record is opened at each of its steps, and
    peer/verifying.py computes ahead of the node, in threads.

    A check has no state, so remembering it changes no answer. Bounded: the older half is forgotten at once.
    """

    def __init__(self) -> None:
        self.computed = 0  # signatures that took an Ed25519 verification, since the process began
        self.remembered = 0  # those that did not
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def knows(self, check: bytes) -> bool:
        """Whether this very check (key, signature, message: 128 bytes) was found right lately."""
        found = self.remembers(check)
        self.remembered += found
        return found

    def remembers(self, check: bytes) -> bool:
        """The same, for who will not use the answer."""
        return check in self._new or check in self._old

    def add(self, check: bytes) -> None:
        """Note a check that was computed and found right. Threads may call it at once."""
        self.computed += 1
        self.note(check)

    def note(self, check: bytes) -> None:
        """Note a check that is right without computing: a signature made here."""
        if len(self._new) >= params.SIGNATURES_REMEMBERED_MAX // 2:
            self._old, self._new = self._new, set()
        self._new.add(check)


verified: Final = Verified()


def peer_name(public: bytes) -> str:
    """The libp2p peer id of a 32-byte public key: 52 letters that begin with 12D3KooW."""
    if len(public) != KEY_BYTES:
        raise ValueError(f"a public key has {KEY_BYTES} bytes, got {len(public)}")
    number = int.from_bytes(PEER_ID_PREFIX + public, "big")
    letters: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        letters.append(BASE58[digit])
    # The prefix begins with one zero byte, which base58 writes as one leading "1".
    return "1" + "".join(reversed(letters))


def peer_key(name: str) -> bytes:
    """The 32-byte public key of a peer id. Raises MalformedRecord for anything but an Ed25519 peer id."""
    if len(name) != NAME_CHARS:
        raise _no_name(name, f"it has {len(name)} letters, not {NAME_CHARS}")
    number = 0
    for place, letter in enumerate(name, 1):
        if letter not in BASE58_VALUE:
            raise _no_name(name, f"letter {place}, {letter!r}, is not one of base58")
        number = number * 58 + BASE58_VALUE[letter]
    length = len(PEER_ID_PREFIX) + KEY_BYTES
    if name[0] != BASE58[0] or number.bit_length() > 8 * length:
        raise _no_name(name, "it is out of range")
    raw = number.to_bytes(length, "big")
    if not raw.startswith(PEER_ID_PREFIX):
        raise _no_name(name, "it is no Ed25519 identity (12D3KooW...)")
    return raw[len(PEER_ID_PREFIX) :]


def short(public: bytes) -> str:
    """The last letters of a peer's name, for people and logs only."""
    return peer_name(public)[-SHORT_CHARS:]


def _message(domain: str, network: bytes, body: bytes) -> bytes:
    return blake("ichiba/sign", domain.encode(), network, body)


def _no_name(name: str, why: str) -> MalformedRecord:
    return MalformedRecord(f"{name[:60]!r} is no peer id", why=why, next_step="copy the whole id from `ichiba status`")
