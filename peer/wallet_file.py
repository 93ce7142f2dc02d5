"""A whole wallet in one file: the key as its file holds it, the network file, and the store.

Promises: a backup is one state of the store, verified before it is called done, taken also while the daemon runs; its
bytes are checked before anything of it is used; and where the key is sealed by a passphrase the store in it is sealed
too. Restoring overwrites nothing: what was there is set aside. A restored store is marked as old, and the node signs
nothing before it has heard what it signed since (peer/restored.py).

Layout: MAGIC, the header's length (4 bytes, big-endian), the header (canonical msgpack), the store in chunks (sealed:
each with its number as nonce, so none can be moved or left out), BLAKE2b-256 of all before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal

import msgspec
import nacl.exceptions
import nacl.secret
import nacl.utils

from peer.home import Home, HomeProblem
from peer.key_file import is_sealed, open_seed
from peer.restored import RESTORED_KEY, RESTORED_TABLE
from peer.store import Batch, Store
from peer.store_check import check
from peer.store_lock import DirectoryLock
from peer.store_schema import DATABASE_NAME
from peer.store_sqlite import copy_database, read_only, synchronise, translated
from protocol import params
from protocol.codec import Digest, PeerKey, Uint, blake, decode, encode
from protocol.errors import IchibaError, NotFound, RemoteProtocolError
from protocol.keys import SigningKey, peer_name
from protocol.network import load

__all__ = ["BadWallet", "WalletHeader", "backup", "describe", "read_header", "restore"]

MAGIC: Final = b"ICHIBA WALLET 1\n"
CHECKSUM_BYTES: Final = 32
SEAL_BYTES: Final = 40  # nonce and tag of a sealed chunk

Moved = Callable[[int, int], None]


class BadWallet(IchibaError):
    """The file is no backup of a wallet, is damaged, or holds what does not belong together."""

    code = "bad-wallet"


class WalletHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/wallet/1"):
    """What a backup says of itself. created_ns: the clock of its machine. salt: makes each sealed backup's key new."""

    peer: PeerKey
    network: Digest
    created_ns: Uint
    key: Annotated[str, msgspec.Meta(max_length=4096)]
    network_file: Annotated[str, msgspec.Meta(max_length=params.WALLET_HEADER_BYTES_MAX // 2)]
    store_bytes: Annotated[int, msgspec.Meta(ge=0, le=params.WALLET_BYTES_MAX)]
    salt: Digest
    kind: Literal["plain", "sealed"]


def backup(home: Home, file: Path, *, passphrase: str | None, moved: Moved, force: bool = False) -> WalletHeader:
    """Write the wallet of `home` to `file`, at once or not at all; nothing needs to be stopped.

    passphrase: of a sealed key. Raises HomeProblem, WrongPassphrase, BadWallet if `file` exists, CorruptStore if the
    store is damaged, DiskFull, StoreFailed.
    """
    file = file.absolute()
    if file.exists() and not force:
        raise BadWallet(f"{file} exists", next_step="choose another name, or --force to replace it")
    key_text, network = home.key_text(), home.network()
    seed = home.seed(passphrase)
    scratch = file.with_name(f"{file.name}.partial")
    with translated(file.parent):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
    try:
        with translated(file.parent):
            copy, store = scratch / DATABASE_NAME, home.path / DATABASE_NAME
            if store.exists():
                with read_only(store) as connection:
                    copy_database(connection, copy)
        if copy.exists():
            check(scratch)
        with translated(file.parent):
            header = WalletHeader(
                peer=SigningKey.from_seed(seed).public,
                network=network.id,
                created_ns=time.time_ns(),
                key=key_text,
                network_file=home.network_file.read_text(),
                store_bytes=copy.stat().st_size if copy.exists() else 0,
                salt=nacl.utils.random(32),
                kind="sealed" if is_sealed(key_text) else "plain",
            )
            draft = scratch / "wallet"
            _write(draft, header, seed, copy, moved)
            draft.replace(file)
            synchronise(file.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return header


def _write(draft: Path, header: WalletHeader, seed: bytes, copy: Path, moved: Moved) -> None:
    head = encode(header)
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    box = _box(header, seed)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:

        def put(data: bytes) -> None:
            digest.update(data)
            out.write(data)

        put(MAGIC + len(head).to_bytes(4, "big") + head)
        if header.store_bytes:
            with copy.open("rb") as store:
                for number, chunk in enumerate(_chunks(store, header.store_bytes, params.WALLET_CHUNK_BYTES)):
                    put(bytes(box.encrypt(chunk, number.to_bytes(24, "big"))) if box is not None else chunk)
                    moved(out.tell(), header.store_bytes)
        out.write(digest.digest())
        out.flush()
        os.fsync(out.fileno())


def _box(header: WalletHeader, seed: bytes) -> nacl.secret.SecretBox | None:
    """What seals the store of a backup: its key is the seed's and the whole header's, so neither can be exchanged."""
    return nacl.secret.SecretBox(blake("ichiba/wallet", seed, encode(header))) if header.kind == "sealed" else None


def _chunks(file: BinaryIO, size: int, step: int) -> Iterator[bytes]:
    left = size
    while left:
        chunk = file.read(min(step, left))
        if not chunk:
            raise BadWallet(f"the file ends {left} bytes early", next_step="take the backup again")
        left -= len(chunk)
        yield chunk


def read_header(file: Path) -> WalletHeader:
    """The header of a backup whose checksum is right. Reads the whole file. Raises BadWallet, OSError."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(MAGIC) + 4)
        length = int.from_bytes(start[-4:], "big")
        if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 4:
            raise BadWallet(f"{file} is no backup of a wallet", next_step="ichiba wallet backup FILE makes one")
        if length > params.WALLET_HEADER_BYTES_MAX or size > 2 * params.WALLET_BYTES_MAX:
            raise BadWallet(f"{file} has a header of {length} and in all {size} bytes, more than a wallet can")
        opened.seek(0)
        digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        for chunk in _chunks(opened, max(0, size - CHECKSUM_BYTES), params.WALLET_CHUNK_BYTES):
            digest.update(chunk)
        if opened.read(CHECKSUM_BYTES + 1) != digest.digest():
            raise BadWallet(f"{file} is damaged: its checksum is wrong", next_step="take another backup")
        opened.seek(len(MAGIC) + 4)
        try:
            return decode(WalletHeader, opened.read(length), bytes_max=params.WALLET_HEADER_BYTES_MAX)
        except RemoteProtocolError as error:
            raise BadWallet(f"{file} has a header that is none: {error}"[:300]) from None


def restore(
    home: Home, file: Path, *, passphrase: str | None, force: bool = False, alone: bool = False, moved: Moved
) -> tuple[WalletHeader, Path | None]:
    """Put the wallet in `file` into `home`; returns its header and the folder with what was there before, if anything.

    alone: the backup is as new as the wallet ever was, or there is no other peer, so nobody has to be asked. Raises
    NotFound, BadWallet, WrongPassphrase, KeyProblem, HomeProblem if a wallet lives there and not `force`,
    AlreadyRunning, CorruptStore, DiskFull, StoreFailed.
    """
    if not file.is_file():
        raise NotFound(f"no file {file}")
    header = read_header(file)
    if is_sealed(header.key) and passphrase is None:
        raise HomeProblem("the key in the backup is sealed", next_step="give its passphrase")
    seed, network = open_seed(header.key, passphrase or ""), load(header.network_file)
    if SigningKey.from_seed(seed).public != header.peer or network.id != header.network:
        raise BadWallet("the key, the network file and the store in the backup do not belong together")
    with translated(home.path):
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = DirectoryLock(home.path)
    draft = Home(home.path / "restoring")
    try:
        living = [f for f in (home.key_file, home.network_file, *_store_files(home.path)) if f.exists()]
        if living and not force:
            raise HomeProblem(
                f"a wallet lives in {home.path}",
                why="restoring an old one over it would lose what it was paid since",
                next_step="choose another --data directory, or --force, which sets it aside",
            )
        with translated(home.path):
            shutil.rmtree(draft.path, ignore_errors=True)
            draft.path.mkdir(mode=0o700)
            _unpack(file, header, seed, draft.path / DATABASE_NAME, moved)
        draft.create(header.network_file, seed=seed)
        draft.write_key(header.key)
        if header.store_bytes:
            check(draft.path)
        with Store.open(draft.path, header.network, header.peer) as store:
            if not alone:
                mark = (RESTORED_TABLE, RESTORED_KEY, time.time_ns().to_bytes(8, "big"))
                store.commit([Batch(puts=(mark,))])
        with translated(home.path):
            aside = _set_aside(home.path, living)
            # The key comes last: a store without its key starts nothing, a key without its store would start anew.
            for name in (DATABASE_NAME, home.network_file.name, home.key_file.name):
                (draft.path / name).rename(home.path / name)
            synchronise(home.path)
            shutil.rmtree(draft.path)
    except (IchibaError, OSError):
        shutil.rmtree(draft.path, ignore_errors=True)
        raise
    finally:
        lock.release()
    return header, aside


def _store_files(directory: Path) -> list[Path]:
    return [directory / f"{DATABASE_NAME}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]


def _set_aside(directory: Path, living: list[Path]) -> Path | None:
    if not living:
        return None
    aside = directory / f"replaced-{1 + len(list(directory.glob('replaced-*')))}"
    aside.mkdir(mode=0o700)
    for file in living:  # the key first: what is left of a crash here starts no daemon
        file.rename(aside / file.name)
    synchronise(directory)
    return aside


def _unpack(file: Path, header: WalletHeader, seed: bytes, path: Path, moved: Moved) -> None:
    """Write the store of a backup to `path`. Raises BadWallet, OSError."""
    if not header.store_bytes:
        return
    box = _box(header, seed)
    extra = SEAL_BYTES if box is not None else 0
    chunks = -(-header.store_bytes // params.WALLET_CHUNK_BYTES)
    with file.open("rb") as source, os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
        source.seek(len(MAGIC) + 4 + len(encode(header)))
        packed = _chunks(source, header.store_bytes + chunks * extra, params.WALLET_CHUNK_BYTES + extra)
        for number, chunk in enumerate(packed):
            nonce = number.to_bytes(24, "big")
            if box is not None and chunk[:24] != nonce:
                raise BadWallet(f"chunk {number} of the backup stands in another's place")
            try:
                out.write(box.decrypt(chunk) if box is not None else chunk)
            except nacl.exceptions.CryptoError:
                raise BadWallet(f"chunk {number} of the backup does not open: it was changed") from None
            moved(out.tell(), header.store_bytes)
        if source.seek(0, os.SEEK_END) - CHECKSUM_BYTES != len(MAGIC) + 4 + len(encode(header)) + (
            header.store_bytes + chunks * extra
        ):
            raise BadWallet("the backup holds more than its header says")
        out.flush()
        os.fsync(out.fileno())


def describe(header: WalletHeader) -> dict[str, object]:
    """A header for people and JSON; never the key."""
    return {
        "peer": peer_name(header.peer),
        "network_id": header.network.hex(),
        "created_ns": header.created_ns,
        "store_bytes": header.store_bytes,
        "sealed": header.kind == "sealed",
    }
