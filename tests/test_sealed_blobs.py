"""The blobs of a sealed job on the wire and on the disk: ciphertext or a refusal, and no way round it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nacl.bindings
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.blobs import ABSENT, SEALED, BlobStore
from peer.links import Stream
from peer.sealed_blobs import Secrets, sealed_chunk, unseal_file
from protocol import params
from protocol.blob import BlobManifest, blob_id, manifest_of
from protocol.codec import encode
from protocol.errors import LimitExceeded, MalformedRecord, NotFound, RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey
from protocol.sealing import (
    PIECE_BYTES,
    Keys,
    access_of,
    box_for,
    check_sealable,
    chunks_of,
    locator_of,
    masked,
    open_chunk,
    read_keys,
    seal_chunk,
    sealed_bytes,
)
from tests.test_blobs import BAD, CHUNK, GOOD, Peers, after
from tests.test_blobs import chunks_of as cut

KEYS, OTHER = Keys(b"k" * 32), Keys(b"o" * 32)


def content(count: int) -> bytes:
    """Bytes of which no 32 occur twice, so that a marker of them is one."""
    return b"".join(i.to_bytes(16, "big") + b"plain-text-shows" for i in range(-(-count // 32)))[:count]


async def ask(store: BlobStore, name: bytes) -> bytes:
    """All that the store gives to who asks for `name`: its reply and every chunk."""
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, {GOOD: store})
        stream = await host.open_stream(GOOD, "blob")
        await stream.send_all(name)
        reply = await stream.receive_frame(2**20) or b""
        got = [reply]
        if reply[0] != ABSENT:
            manifest = BlobManifest.from_bytes(reply[1:], blob=blob_id(_manifest(reply)))
            for index in range(len(manifest.chunks)):
                await stream.send_all(index.to_bytes(4, "big"))
                got.append(await stream.receive_exactly(manifest.chunk_bytes(index)))
        stream.reset()
        nursery.cancel_scope.cancel()
    return b"".join(got)


def _manifest(reply: bytes) -> BlobManifest:
    from peer.sealed_blobs import read_manifest

    return read_manifest(reply[1:])


async def fetched(
    own: BlobStore,
    servers: dict[bytes, BlobStore],
    blob: bytes,
    peers: list[bytes],
    *,
    keys: Keys | None = KEYS,
    size_max: int = 2**30,
    tampers: dict[bytes, Callable[[bytes], bytes]] | None = None,
) -> Peers:
    """Fetch over streams in memory; the host, which knows who was penalised. Raises as `BlobStore.fetch`."""
    fault: Exception | None = None
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        host.tampers.update(tampers or {})
        try:
            await own.fetch(host, blob, peers, size_max=size_max, keys=keys)
        except (NotFound, LimitExceeded) as error:
            fault = error
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault
    return host


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, CHUNK, 2 * CHUNK + 7])
async def test_a_sealed_blob_arrives_as_it_was_and_shows_nothing_on_the_way(tmp_path: Path, size: int) -> None:
    data = content(size)
    server, own = BlobStore(tmp_path / "a", 100 * CHUNK), BlobStore(tmp_path / "b", 100 * CHUNK)
    blob = await server.put_bytes(data, keys=KEYS)
    assert await ask(server, blob) == bytes([ABSENT]), "whoever guesses the bytes has no answer"
    sealed = await ask(server, locator_of(KEYS.access(blob)))
    assert sealed[0] == SEALED
    for start in range(0, max(0, size - 32), 4096):
        assert data[start : start + 32] not in sealed
    await fetched(own, {GOOD: server}, blob, [GOOD])
    assert own.path(blob).read_bytes() == data
    assert await ask(own, blob) == bytes([ABSENT]) and await ask(own, locator_of(KEYS.access(blob))) == sealed
    assert not list((tmp_path / "b" / "partial").iterdir()), "no ciphertext is left"


async def test_who_has_another_key_or_none_gets_a_refusal_also_after_a_restart(tmp_path: Path) -> None:
    data = content(CHUNK + 9)
    server = BlobStore(tmp_path / "a", 100 * CHUNK)
    blob = await server.put_bytes(data)
    assert (await ask(server, blob))[0] != ABSENT
    server.protect([blob], KEYS)
    for store in (server, BlobStore(tmp_path / "a", 100 * CHUNK)):
        for name in (blob, locator_of(OTHER.access(blob)), KEYS.access(blob), KEYS.job, bytes(32)):
            assert await ask(store, name) == bytes([ABSENT])
        assert (await ask(store, locator_of(KEYS.access(blob))))[0] == SEALED
    own = BlobStore(tmp_path / "own", 100 * CHUNK)
    for keys in (None, OTHER):
        with pytest.raises(NotFound, match="does not have it"):
            await fetched(own, {GOOD: server}, blob, [GOOD], keys=keys)
    assert not own.has(blob)


async def test_an_upload_for_a_sealed_job_is_nobodys_before_the_job_names_it(tmp_path: Path) -> None:
    server = BlobStore(tmp_path, 100 * CHUNK)
    blob = await server.put_bytes(content(100), keys=Keys())
    assert await ask(server, blob) == bytes([ABSENT])
    again = BlobStore(tmp_path, 100 * CHUNK)
    assert await ask(again, blob) == bytes([ABSENT])
    again.protect([blob], KEYS)
    assert (await ask(again, locator_of(KEYS.access(blob))))[0] == SEALED


def swap_chunks() -> Callable[[bytes], bytes]:
    """Give chunk 0 where chunk 1 is asked for, and the other way round."""
    held: list[bytes] = []

    def tamper(data: bytes) -> bytes:
        if len(data) < 1000:
            return data
        held.append(data)
        return held[0]

    return tamper


@pytest.mark.parametrize("tamper", [after(0, lambda c: bytes(len(c))), swap_chunks()], ids=["changed", "swapped"])
async def test_a_changed_or_swapped_chunk_is_penalised_and_the_next_peer_asked(
    tmp_path: Path, tamper: Callable[[bytes], bytes]
) -> None:
    data = content(3 * CHUNK)
    servers = {peer: BlobStore(tmp_path / peer[:1].hex(), 100 * CHUNK) for peer in (GOOD, BAD)}
    (blob,) = {await server.put_bytes(data, keys=KEYS) for server in servers.values()}
    own = BlobStore(tmp_path / "own", 100 * CHUNK)
    host = await fetched(own, servers, blob, [BAD, GOOD], tampers={BAD: tamper})
    assert host.penalties == [BAD] and own.path(blob).read_bytes() == data


class Forger(BlobStore):
    """Serves any ciphertext under any locator, with a manifest that is true of it."""

    sealed: bytes = b""

    async def serve(self, peer: bytes, stream: Stream) -> None:
        manifest = manifest_of(cut(self.sealed))
        await stream.receive_exactly(32)
        await stream.send_frame(bytes([SEALED]) + encode(manifest))
        while len(head := await stream.receive_some(4)) == 4:
            index = int.from_bytes(head, "big")
            await stream.send_all(self.sealed[index * CHUNK : (index + 1) * CHUNK])


def sealed_under(keys: Keys, blob: bytes, data: bytes) -> list[bytes]:
    count = chunks_of(len(data))
    pieces = [data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES] for i in range(count)]
    return [seal_chunk(keys.access(blob), i, piece, last=i == count - 1) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize("fraud", ["wrong-key", "truncated", "reordered", "other-blob", "other-bytes", "extended"])
async def test_a_ciphertext_with_a_true_manifest_is_still_refused_where_it_does_not_open(
    tmp_path: Path, fraud: str
) -> None:
    data = content(3 * PIECE_BYTES)
    blob = blob_id(manifest_of(cut(data)))
    right = sealed_under(KEYS, blob, data)
    forged = {
        "wrong-key": sealed_under(OTHER, blob, data),
        "truncated": right[:2],
        "reordered": [right[1], right[0], right[2]],
        "other-blob": sealed_under(KEYS, b"x" * 32, data),
        "other-bytes": sealed_under(KEYS, blob, data[:-1] + b"!"),  # by somebody who has the key
        "extended": [*right, right[2]],
    }[fraud]
    forger, honest = Forger(tmp_path / "forger", 100 * CHUNK), BlobStore(tmp_path / "good", 100 * CHUNK)
    forger.sealed = b"".join(forged)
    await honest.put_bytes(data, keys=KEYS)
    own = BlobStore(tmp_path / "own", 100 * CHUNK)
    host = await fetched(own, {BAD: forger, GOOD: honest}, blob, [BAD, GOOD])
    assert host.penalties == [BAD] and own.path(blob).read_bytes() == data
    assert not list((tmp_path / "own" / "blobs").glob("*.new"))


async def test_a_ciphertext_larger_than_wanted_is_not_fetched(tmp_path: Path) -> None:
    server, own = BlobStore(tmp_path / "a", 100 * CHUNK), BlobStore(tmp_path / "own", 100 * CHUNK)
    blob = await server.put_bytes(content(2 * CHUNK), keys=KEYS)
    with pytest.raises(LimitExceeded):
        await fetched(own, {GOOD: server}, blob, [GOOD], size_max=CHUNK)
    await fetched(own, {GOOD: server}, blob, [GOOD], size_max=2 * CHUNK)
    unbounded = BlobStore(tmp_path / "unbounded", 100 * CHUNK)
    await fetched(unbounded, {GOOD: server}, blob, [GOOD], size_max=params.BLOB_BYTES_MAX)  # as a checker asks


async def test_a_download_that_broke_goes_on_with_another_peers_ciphertext(tmp_path: Path) -> None:
    data = content(5 * CHUNK)
    servers = {peer: BlobStore(tmp_path / peer[:1].hex(), 100 * CHUNK) for peer in (GOOD, BAD)}
    (blob,) = {await server.put_bytes(data, keys=KEYS) for server in servers.values()}
    own = BlobStore(tmp_path / "own", 100 * CHUNK)

    def hang_up(_: bytes) -> bytes:
        raise EOFError

    sent = dict.fromkeys(servers, 0)

    def count(peer: bytes, then: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def tamper(data: bytes) -> bytes:
            made = then(data)
            sent[peer] += len(made) >= 1000
            return made

        return tamper

    tampers = {BAD: count(BAD, after(3, hang_up)), GOOD: count(GOOD, lambda data: data)}
    await fetched(own, servers, blob, [BAD, GOOD], tampers=tampers)
    assert own.path(blob).read_bytes() == data
    assert sent[BAD] == 3 and sent[GOOD] < 6, "the same key makes the same ciphertext everywhere"


async def test_what_was_here_openly_goes_on_being_served(tmp_path: Path) -> None:
    data = content(100)
    server, own = BlobStore(tmp_path / "a", 100 * CHUNK), BlobStore(tmp_path / "own", 100 * CHUNK)
    blob = await server.put_bytes(data, keys=KEYS)
    await own.put_bytes(data)
    await fetched(own, {GOOD: server}, blob, [GOOD])
    assert (await ask(own, blob))[0] == 0, "a stranger's sealed job must not take a blob from everybody else's"
    assert (await ask(own, locator_of(KEYS.access(blob))))[0] == SEALED


# --- the marks on the disk -----------------------------------------------------------------------------------
def test_a_mark_that_a_crash_cut_off_is_dropped_and_the_whole_ones_stay(tmp_path: Path) -> None:
    path, a, b = tmp_path / "secrets", b"a" * 32, b"b" * 32
    marks = Secrets(path, here={a, b})
    marks.protect({a: KEYS.access(a)}, hide=True)
    marks.protect({b: KEYS.access(b)}, hide=True)
    assert os.stat(path).st_mode & 0o077 == 0, "it holds keys"
    path.write_bytes(path.read_bytes()[:-1])
    again = Secrets(path, here={a, b})
    assert again.hides(a) and not again.hides(b) and path.stat().st_size == 65
    assert Secrets(path, here={b}).sought(locator_of(KEYS.access(a))) is None, "a blob that is gone needs no mark"


def test_keys_of_one_blob_are_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    marks, blob = Secrets(tmp_path / "secrets", here=set()), b"a" * 32
    keys = [access_of(i.to_bytes(32, "big"), blob) for i in range(params.SEALED_KEYS_PER_BLOB_MAX + 1)]
    for key in keys:
        marks.protect({blob: key}, hide=True)
    assert marks.sought(locator_of(keys[0])) is None and marks.sought(locator_of(keys[1])) == (blob, keys[1])
    assert marks.hides(blob)


def test_opening_holds_one_chunk_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(4 * PIECE_BYTES + 5)
    blob = blob_id(manifest_of(cut(data)))
    (tmp_path / "sealed").write_bytes(b"".join(sealed_under(KEYS, blob, data)))
    longest = [0]
    opened = open_chunk

    def watch(access: bytes, index: int, chunk: bytes, *, last: bool) -> bytes:
        longest[0] = max(longest[0], len(chunk))
        return opened(access, index, chunk, last=last)

    monkeypatch.setattr("peer.sealed_blobs.open_chunk", watch)
    unseal_file(tmp_path / "sealed", tmp_path / "plain", blob, KEYS.access(blob))
    assert (tmp_path / "plain").read_bytes() == data and longest[0] <= CHUNK


# --- the cipher ----------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    piece=st.binary(max_size=300), index=st.integers(0, 2**32), last=st.booleans(),
    flip=st.integers(0, 299), other=st.sampled_from(["key", "blob", "index", "last", "bit", "cut"]),
)  # fmt: skip
def test_a_chunk_opens_only_as_it_was_sealed(piece: bytes, index: int, last: bool, flip: int, other: str) -> None:
    access = access_of(b"j" * 32, b"b" * 32)
    chunk = seal_chunk(access, index, piece, last=last)
    assert open_chunk(access, index, chunk, last=last) == piece and chunk != piece
    assert seal_chunk(access, index, piece, last=last) == chunk, "so that a download goes on with another peer"
    at = flip % len(chunk)
    turned = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
    wrong = {
        "key": (access_of(b"J" * 32, b"b" * 32), index, chunk, last),
        "blob": (access_of(b"j" * 32, b"B" * 32), index, chunk, last),
        "index": (access, index + 1, chunk, last), "last": (access, index, chunk, not last),
        "bit": (access, index, turned, last), "cut": (access, index, chunk[:-1], last),
    }[other]  # fmt: skip
    with pytest.raises(VerificationFailed):
        open_chunk(*wrong[:3], last=wrong[3])


def test_no_two_chunks_are_sealed_under_one_key_and_nonce() -> None:
    accesses = [access_of(key, blob) for key in (b"j" * 32, b"k" * 32) for blob in (b"a" * 32, b"b" * 32)]
    empty = {seal_chunk(a, index, b"", last=last) for a in accesses for index in range(50) for last in (True, False)}
    assert len(empty) == len(accesses) * 100, "the tag of nothing is the key stream's own"


def test_a_box_is_libsodiums_and_opens_for_its_receiver_only() -> None:
    mine, theirs = SigningKey.from_seed(b"m" * 32), SigningKey.from_seed(b"t" * 32)
    box = box_for(mine.public, b"hello", ephemeral=b"e" * 32)
    assert mine.open_box(box) == b"hello"
    curve = nacl.bindings.crypto_sign_ed25519_pk_to_curve25519(mine.public)
    assert mine.open_box(nacl.bindings.crypto_box_seal(b"by libsodium", curve)) == b"by libsodium"
    for key, bad in [
        (theirs, box),
        (mine, box[:-1]),
        (mine, b""),
        (mine, box[:40]),
        (mine, bytes([box[0] ^ 1]) + box[1:]),
    ]:
        with pytest.raises(VerificationFailed):
            key.open_box(bad)
    for hostile in (bytes(32), b"\x01" + bytes(31), b"\xff" * 32, b"short"):
        with pytest.raises(VerificationFailed):
            box_for(hostile, b"hello", ephemeral=b"e" * 32)


@given(data=st.binary(max_size=200))
def test_garbage_is_no_keys(data: bytes) -> None:
    if data != encode(Keys()) and not data.startswith(b"\x92"):
        with pytest.raises(RemoteProtocolError):
            read_keys(data)


def test_single_keys_open_their_blobs_only_and_say_nothing_of_the_jobs() -> None:
    a, b = b"a" * 32, b"b" * 32
    some = KEYS.only((a,))
    assert some.access(a) == KEYS.access(a) and not some.job and some.only((b,)).blobs == ()
    with pytest.raises(NotFound):
        some.access(b)
    assert KEYS.access(a) != KEYS.access(b)
    assert Keys(some.access(a)).access(b) != KEYS.access(b)


def test_a_masked_value_needs_its_salt() -> None:
    value = b"v" * 32
    assert masked(b"", value) == value
    assert len({value, masked(b"s" * 32, value), masked(b"t" * 32, value), masked(b"s" * 32, b"w" * 32)}) == 4


def test_a_blob_too_long_to_seal_is_said() -> None:
    with pytest.raises(LimitExceeded):
        check_sealable(params.BLOB_BYTES_MAX)
    check_sealable(params.BLOB_BYTES_MAX - 2**20)
    assert sealed_bytes(0) == 0 and sealed_bytes(PIECE_BYTES) == CHUNK


def test_a_manifest_of_a_ciphertext_is_still_checked() -> None:
    manifest = manifest_of([b"x" * 10])
    for lie in (BlobManifest(CHUNK + 1, manifest.chunks), BlobManifest(0, manifest.chunks)):
        with pytest.raises(MalformedRecord):
            _manifest(bytes([SEALED]) + encode(lie))


def test_a_sealed_chunk_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data, access = content(PIECE_BYTES + 3), KEYS.access(b"b" * 32)
    (tmp_path / "plain").write_bytes(data)
    with (tmp_path / "plain").open("rb") as file:
        assert sealed_chunk(file.fileno(), access, 1, True) == seal_chunk(access, 1, data[PIECE_BYTES:], last=True)
