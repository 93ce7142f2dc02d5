"""The file that holds a peer's secret: plain hex, or sealed by a passphrase.

Promises: what was written is read back or refused, and a wrong passphrase is told from a damaged file. A sealed file
states how it was sealed, so the limits may change without breaking it; they are bounded on reading, because a backup
may come from anybody. Argon2id (RFC 9106) makes the key, XSalsa20-Poly1305 (NaCl secretbox) seals the seed.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import nacl.exceptions
import nacl.pwhash.argon2id
import nacl.secret
import nacl.utils

from protocol import params
from protocol.errors import IchibaError
from protocol.keys import SigningKey, peer_name

__all__ = ["KeyProblem", "WrongPassphrase", "checked_passphrase", "is_sealed", "open_seed", "replace_file", "seal_seed"]

SEED_BYTES: Final = 32
SEED_CHARS: Final = 2 * SEED_BYTES


class KeyProblem(IchibaError):
    """The key file is damaged, or asks for what this program will not do."""

    code = "key-file"
    exit_code = 2


class WrongPassphrase(KeyProblem):
    """The passphrase does not open the key file."""

    code = "wrong-passphrase"


Salt = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Sealed = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{144}$")]  # nonce of 24, tag of 16 and seed of 32 bytes


class _SealedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sealed key file, one JSON object. memory in bytes."""

    ichiba_key: Literal[1]
    peer: str
    kdf: Literal["argon2id"]
    passes: Annotated[int, msgspec.Meta(ge=1, le=params.KEY_PASSES_MAX)]
    memory: Annotated[int, msgspec.Meta(ge=8192, le=params.KEY_MEMORY_BYTES_MAX)]
    salt: Salt
    sealed: Sealed


def is_sealed(text: str) -> bool:
    """Whether a key file's text is a sealed one."""
    return text.lstrip().startswith("{")


def checked_passphrase(passphrase: str) -> bytes:
    """The bytes of a passphrase, the same however its letters were composed. Raises KeyProblem for one that is too
    short to protect anything, or too long."""
    if len(passphrase) < params.PASSPHRASE_CHARS_MIN:
        raise KeyProblem(
            f"a passphrase of {len(passphrase)} characters",
            why="whoever copies the file may try passphrases for years",
            next_step=f"take at least {params.PASSPHRASE_CHARS_MIN} characters: four words are better than one",
        )
    data = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    if len(data) > params.PASSPHRASE_BYTES_MAX:
        raise KeyProblem(f"a passphrase of {len(data)} bytes, at most {params.PASSPHRASE_BYTES_MAX}")
    return data


def seal_seed(
    seed: bytes, passphrase: str, *, passes: int = params.KEY_PASSES, memory: int = params.KEY_MEMORY_BYTES
) -> str:
    """The text of a key file that holds `seed` (32 bytes) sealed by `passphrase`. About a second. Raises KeyProblem."""
    salt = nacl.utils.random(nacl.pwhash.argon2id.SALTBYTES)
    secret = nacl.pwhash.argon2id.kdf(
        nacl.secret.SecretBox.KEY_SIZE, checked_passphrase(passphrase), salt, opslimit=passes, memlimit=memory
    )
    fields: dict[str, Any] = {
        "ichiba_key": 1,
        "peer": peer_name(SigningKey.from_seed(seed).public),
        "kdf": "argon2id",
        "passes": passes,
        "memory": memory,
        "salt": salt.hex(),
        "sealed": bytes(nacl.secret.SecretBox(secret).encrypt(seed)).hex(),
    }
    return json.dumps(fields)


def open_seed(text: str, passphrase: str) -> bytes:
    """The seed (32 bytes) in a key file's text. `passphrase` is not looked at for a plain one.

    Raises WrongPassphrase, and KeyProblem for a file that is damaged or whose limits are beyond ours.
    """
    if not is_sealed(text):
        try:
            seed = bytes.fromhex(text) if len(text.strip()) == SEED_CHARS else b""
        except ValueError:
            seed = b""
        if len(seed) != SEED_BYTES:
            raise KeyProblem("the key file is damaged", next_step="restore it from your backup of the key")
        return seed
    try:
        held = msgspec.json.decode(text, type=_SealedKey)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise KeyProblem(f"the key file is damaged: {error}"[:300], next_step="restore it from your backup") from None
    data = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    if len(data) > params.PASSPHRASE_BYTES_MAX:
        raise WrongPassphrase(f"a passphrase of {len(data)} bytes", next_step="try again")
    try:
        secret = nacl.pwhash.argon2id.kdf(
            nacl.secret.SecretBox.KEY_SIZE, data, bytes.fromhex(held.salt), opslimit=held.passes, memlimit=held.memory
        )
        seed = nacl.secret.SecretBox(secret).decrypt(bytes.fromhex(held.sealed))
    except nacl.exceptions.RuntimeError as error:
        raise KeyProblem(
            f"the key cannot be opened: {error}", why=f"it takes {held.memory // 2**20} MiB of free memory"
        ) from None
    except nacl.exceptions.CryptoError:
        raise WrongPassphrase(
            "the passphrase does not open the key",
            why="it is another one, or the file was changed",
            next_step="try again; without the passphrase only a backup of the plain key helps",
        ) from None
    if peer_name(SigningKey.from_seed(seed).public) != held.peer:
        raise KeyProblem(f"the key file names peer {held.peer[:60]} and holds another's key")
    return seed


def replace_file(path: Path, text: str) -> None:
    """Write a secret file, mode 0600, so that a crash leaves the old content or the new. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
