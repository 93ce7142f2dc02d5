"""Sealed jobs: what hides a job's content from all but those it is opened to. DESIGN §12; docs/decisions/0014.

Promises: whoever lacks the job's key learns of its blobs only their lengths, and cannot confirm a guess of what they
hold; each key of a blob opens that blob alone; a chunk opens only in its own place, of its own blob, under its own key.
Pure: randomness is passed in. Sources: XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03) per chunk in the STREAM
construction (Hoang, Reyhanitabar, Rogaway, Vizár 2015: the place and whether it is the last one are in the nonce);
libsodium's sealed boxes, X25519 over the converted Ed25519 key, for keys.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

import msgspec
import nacl.bindings as sodium
import nacl.exceptions

from protocol import params
from protocol.codec import Digest, blake, decode, encode
from protocol.errors import LimitExceeded, NotFound, VerificationFailed

__all__ = [
    "NO_KEYS",
    "Contents",
    "Keys",
    "access_of",
    "box_for",
    "box_of",
    "check_sealable",
    "chunks_of",
    "locator_of",
    "masked",
    "open_chunk",
    "read_keys",
    "seal_chunk",
    "sealed_bytes",
]

TAG_BYTES: Final = sodium.crypto_aead_xchacha20poly1305_ietf_ABYTES
PIECE_BYTES: Final = params.BLOB_CHUNK_BYTES - TAG_BYTES  # of plaintext in each chunk, so that a chunk stays a chunk
_NONCE_BYTES: Final = sodium.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES


class Keys(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer may open of one sealed job: all of it by the job's key, or some blobs by their own."""

    job: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    blobs: Annotated[tuple[tuple[Digest, Digest], ...], msgspec.Meta(max_length=params.SEALED_KEYS_GIVEN_MAX)] = ()

    def access(self, blob: bytes) -> bytes:
        """The 32-byte key of one blob. Raises NotFound if it is not among these."""
        if self.job:
            return access_of(self.job, blob)
        found = dict(self.blobs).get(blob)
        if found is None:
            raise NotFound(f"no key for blob {blob.hex()[:12]} of a sealed job", why="it was not opened to this peer")
        return found

    def only(self, blobs: tuple[bytes, ...]) -> Keys:
        """The keys of just these blobs, as far as they are here."""
        if not self.job:
            return Keys(b"", tuple(pair for pair in self.blobs if pair[0] in blobs))
        return Keys(b"", tuple((blob, access_of(self.job, blob)) for blob in blobs))


NO_KEYS: Final = Keys()
"""Of what is for nobody else: it is served neither as it is nor sealed."""


class Contents(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the winner of a sealed job is given in a box: the job's key and all that its offer did not show."""

    agreement: Digest
    key: Digest
    task: Annotated[bytes, msgspec.Meta(max_length=params.MESSAGE_BYTES_MAX)]
    base_blob: Annotated[bytes, msgspec.Meta(max_length=32)]
    base_root: Digest


def read_keys(data: bytes) -> Keys:
    """Keys out of an opened box. Raises RemoteProtocolError."""
    return decode(Keys, data, bytes_max=params.MESSAGE_BYTES_MAX)


def masked(salt: bytes, value: bytes) -> bytes:
    """What a public record says instead of `value` (32 bytes): without the salt nobody can tell which value it is.

    salt: of the task, 32 secret bytes; empty for an open job, whose values stand as they are.
    """
    return blake("ichiba/sealed-value", salt, value) if salt else value


# --- blobs -----------------------------------------------------------------------------------------------------
def access_of(job_key: bytes, blob: bytes) -> bytes:
    """The key of one blob of a job, 32 bytes: it says nothing about the job's key or those of other blobs."""
    return blake("ichiba/sealed-access", job_key, blob)


def locator_of(access: bytes) -> bytes:
    """The name by which a sealed blob is asked for, 32 bytes: only who may open the blob knows it."""
    return blake("ichiba/sealed-locator", access)


def chunks_of(size: int) -> int:
    """The sealed chunks of a blob of `size` bytes; none of an empty one."""
    return -(-size // PIECE_BYTES)


def sealed_bytes(size: int) -> int:
    """The length of a blob of `size` bytes when it is sealed."""
    return size + TAG_BYTES * chunks_of(size)


def check_sealable(size: int) -> None:
    """Raise LimitExceeded if a blob of `size` bytes is too long to be sent sealed."""
    if sealed_bytes(size) > params.BLOB_BYTES_MAX:
        raise LimitExceeded(
            f"a blob of {size} bytes, {sealed_bytes(size)} when it is sealed; at most {params.BLOB_BYTES_MAX} are sent"
        )


def _nonce(index: int, last: bool) -> bytes:
    # Each (key, nonce) meets one plaintext only: the key is derived from the blob's hash, the nonce is the place in it.
    return index.to_bytes(8, "big") + bytes([last]) + bytes(_NONCE_BYTES - 9)


def _content_key(access: bytes) -> bytes:
    return blake("ichiba/sealed-content", access)


def seal_chunk(access: bytes, index: int, piece: bytes, *, last: bool) -> bytes:
    """Chunk `index` of a sealed blob: `piece` (PIECE_BYTES of plaintext, fewer in the last) and its tag."""
    return sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(piece, b"", _nonce(index, last), _content_key(access))


def open_chunk(access: bytes, index: int, chunk: bytes, *, last: bool) -> bytes:
    """The plaintext of chunk `index`.

    Raises VerificationFailed for another key or blob, a changed chunk, one out of its place, or one that was not the
    last and now is (or the other way round).
    """
    try:
        return sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(chunk, b"", _nonce(index, last), _content_key(access))
    except (nacl.exceptions.CryptoError, ValueError):
        raise VerificationFailed(
            f"sealed chunk {index} does not open",
            why="it was changed, cut off or moved, or sealed under another key",
        ) from None


# --- keys ------------------------------------------------------------------------------------------------------
def box_for(public: bytes, data: bytes, *, ephemeral: bytes) -> bytes:
    """A sealed box (libsodium's crypto_box_seal) that only the holder of an Ed25519 key opens: `SigningKey.open_box`.

    public: 32 bytes, the peer's key. ephemeral: 32 secret random bytes, used once. Raises VerificationFailed for a key
    that has no X25519 form.
    """
    try:
        recipient = sodium.crypto_sign_ed25519_pk_to_curve25519(public)
        own = sodium.crypto_scalarmult_base(ephemeral)
        nonce = hashlib.blake2b(own + recipient, digest_size=sodium.crypto_box_NONCEBYTES).digest()
        return own + sodium.crypto_box(data, nonce, recipient, ephemeral)
    except (nacl.exceptions.CryptoError, ValueError):
        raise VerificationFailed(f"no box can be sealed to the key {public.hex()[:12]}") from None


def box_of(keys: Keys, public: bytes, *, ephemeral: bytes) -> bytes:
    """Keys in a box for one peer."""
    return box_for(public, encode(keys), ephemeral=ephemeral)
