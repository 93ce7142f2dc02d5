"""Many Ed25519 signatures at once, checked or made in one call that lets other threads run for the whole of it.

One by one, each call gives the interpreter's lock away for some fifty microseconds and waits up to milliseconds to have
it back. Promises the answers of libsodium's functions, for it calls them; where the loop around them
(protocol/c/signatures.c) was not compiled, it calls them one by one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Final

import nacl.bindings
import nacl.exceptions

from protocol.compiled import Function, compiled_library

__all__ = ["check_many", "make_many", "signatures_library"]

CHECK_BYTES: Final = 128  # public key, signature, message
SIGNATURE_BYTES: Final = 64
MESSAGE_BYTES: Final = 32
_VERSION: Final = 1  # of protocol/c/signatures.c: a helper of other sources than these is not used


class _Library:
    """The compiled loops, with the addresses of what they call."""

    def __init__(self, found: ctypes.CDLL) -> None:
        """Raises AttributeError or ImportError where PyNaCl is not what these sources know."""
        from nacl._sodium import ffi, lib  # type: ignore[import-not-found, unused-ignore]

        self.check, self.make = found.ichiba_signatures_check, found.ichiba_signatures_make
        self.open_address = int(ffi.cast("uintptr_t", ffi.addressof(lib, "crypto_sign_open")))
        self.sign_address = int(ffi.cast("uintptr_t", ffi.addressof(lib, "crypto_sign")))


@functools.cache
def signatures_library() -> _Library | None:
    """The compiled loops, or None where they were not built, or PyNaCl keeps libsodium elsewhere."""
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    functions: dict[str, Function] = {
        "ichiba_signatures_version": (whole, ()),
        "ichiba_signatures_check": (None, (pointer, ctypes.c_char_p, whole, pointer)),
        "ichiba_signatures_make": (whole, (pointer, ctypes.c_char_p, ctypes.c_char_p, whole, pointer)),
    }
    found = compiled_library(__file__, "_signatures", functions, version="ichiba_signatures_version", wanted=_VERSION)
    try:
        return None if found is None else _Library(found)
    except (AttributeError, ImportError):
        return None


def check_many(checks: Sequence[bytes]) -> list[bool]:
    """Whether each signature is right. A check: public key, signature, message (32, 64 and 32 bytes)."""
    joined = b"".join(checks)
    assert len(joined) == CHECK_BYTES * len(checks)
    library = signatures_library()
    if library is None:
        return [_is_right(check) for check in checks]
    right = ctypes.create_string_buffer(len(checks))
    library.check(library.open_address, joined, len(checks), right)
    return [one == 1 for one in right.raw]


def make_many(secret: bytes, messages: Sequence[bytes]) -> list[bytes]:
    """The signature of each message (32 bytes) by a secret key in libsodium's form (64 bytes)."""
    joined = b"".join(messages)
    assert len(joined) == MESSAGE_BYTES * len(messages)
    assert len(secret) == nacl.bindings.crypto_sign_SECRETKEYBYTES
    library = signatures_library()
    if library is None:
        return [nacl.bindings.crypto_sign(message, secret)[:SIGNATURE_BYTES] for message in messages]
    made = ctypes.create_string_buffer(SIGNATURE_BYTES * len(messages))
    count = library.make(library.sign_address, secret, joined, len(messages), made)
    assert count == len(messages), "libsodium does not sign"
    whole = made.raw
    return [whole[at : at + SIGNATURE_BYTES] for at in range(0, len(whole), SIGNATURE_BYTES)]


def _is_right(check: bytes) -> bool:
    try:
        nacl.bindings.crypto_sign_open(check[32:], check[:32])
    except nacl.exceptions.BadSignatureError:
        return False
    return True
