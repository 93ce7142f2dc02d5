"""Blobs: one id fixes every byte; the store keeps what it says, evicts what it may, and resumes what broke."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from peer.blobs import BlobStore, DiskFull
from peer.links import PeerUnreachable, Stream
from protocol import params
from protocol.blob import BlobManifest, blob_id, manifest_of
from protocol.codec import encode
from protocol.errors import CorruptStore, LimitExceeded, MalformedRecord, NotFound, VerificationFailed
from tests.test_yamux import two_sessions

CHUNK = params.BLOB_CHUNK_BYTES
GOOD, BAD, DEAD = b"g" * 32, b"b" * 32, b"d" * 32


def chunks_of(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]


def random_bytes(count: int) -> bytes:
    return bytes(i * i % 251 for i in range(1000)) * (count // 1000) + bytes(count % 1000)


# --- manifests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_a_manifest_reads_back_for_its_id_only(size: int) -> None:
    manifest = manifest_of(chunks_of(bytes(size)))
    assert manifest.size == size
    assert BlobManifest.from_bytes(encode(manifest), blob=blob_id(manifest)) == manifest
    with pytest.raises(VerificationFailed):
        BlobManifest.from_bytes(encode(manifest), blob=bytes(32))


def test_blobs_of_equal_start_but_other_length_have_other_ids() -> None:
    ids = {blob_id(manifest_of(chunks_of(bytes(size)))) for size in (0, 1, 2, CHUNK, CHUNK + 1)}
    assert len(ids) == 5


@given(lie=st.integers(0, 4 * CHUNK))
def test_a_manifest_cannot_lie_about_its_size(lie: int) -> None:
    manifest = manifest_of(chunks_of(bytes(CHUNK + 5)))
    if lie == manifest.size:
        return
    with pytest.raises((MalformedRecord, VerificationFailed)):
        BlobManifest.from_bytes(encode(BlobManifest(lie, manifest.chunks)), blob=blob_id(manifest))


@given(data=st.binary(max_size=200))
def test_garbage_is_no_manifest(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        BlobManifest.from_bytes(data, blob=bytes(32))


def test_too_large_a_blob_is_refused_before_it_is_fetched() -> None:
    manifest = manifest_of(chunks_of(bytes(100)))
    with pytest.raises(LimitExceeded, match="100 bytes, at most 99"):
        BlobManifest.from_bytes(encode(manifest), blob=blob_id(manifest), size_max=99)


def test_a_chunk_fits_only_its_own_place() -> None:
    data = bytes(CHUNK) + b"x" * CHUNK + b"tail"
    manifest = manifest_of(chunks_of(data))
    manifest.check_chunk(2, b"tail")
    for index, wrong in [(0, b"x" * CHUNK), (2, b"tail\0"), (2, b"tai"), (2, b"")]:
        with pytest.raises(VerificationFailed):
            manifest.check_chunk(index, wrong)
    with pytest.raises(MalformedRecord):
        manifest.check_chunk(3, b"")


def test_only_the_last_chunk_may_be_short() -> None:
    with pytest.raises(MalformedRecord):
        manifest_of([b"short", bytes(CHUNK)])
    with pytest.raises(MalformedRecord):
        manifest_of([b"a", b""])


# --- the store -------------------------------------------------------------------------------------------------


async def test_what_is_put_can_be_read_also_after_a_restart(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "s", 10 * CHUNK)
    data = random_bytes(2 * CHUNK + 7)
    (tmp_path / "file").write_bytes(data)
    blob = await store.put_bytes(data)
    assert await store.put_file(tmp_path / "file") == blob
    assert blob == blob_id(manifest_of(chunks_of(data)))
    again = BlobStore(tmp_path / "s", 10 * CHUNK)
    assert again.has(blob) and again.path(blob).read_bytes() == data
    assert again.manifest(blob).size == again.size(blob) == len(data) == again.total_bytes()
    assert [p.suffix for p in sorted((tmp_path / "s" / "blobs").iterdir())] == [".data", ".manifest"]


async def test_an_empty_blob_is_a_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK)
    blob = await store.put_bytes(b"")
    assert store.path(blob).read_bytes() == b""


def test_what_is_not_here_says_so(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK)
    for call in (store.path, store.manifest, store.pin, store.size):
        with pytest.raises(NotFound):
            call(bytes(32))
    assert not store.has(bytes(32))


async def test_eviction_takes_the_longest_unused_and_never_a_pinned_one(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 3 * CHUNK)
    pinned, old, used = [await store.put_bytes(bytes([i]) * CHUNK) for i in range(3)]
    store.pin(pinned, "job-1")
    store.path(old)
    store.path(used)
    new = await store.put_bytes(b"n" * CHUNK)
    assert [store.has(blob) for blob in (pinned, old, used, new)] == [True, False, True, True]
    again = BlobStore(tmp_path, 3 * CHUNK)
    assert again.evict(bytes_wanted=3 * CHUNK) == 2 * CHUNK and again.has(pinned)
    again.unpin(pinned, "job-1")
    assert again.evict(bytes_wanted=1) == CHUNK and not again.has(pinned)


async def test_two_owners_of_a_pin_both_count(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK)
    blob = await store.put_bytes(b"x")
    store.pin(blob, "one")
    store.pin(blob, "two")
    store.unpin(blob, "one")
    assert store.evict(bytes_wanted=1) == 0
    store.unpin(blob, "two")
    assert store.evict(bytes_wanted=1) == 1


async def test_an_owner_releases_all_it_pinned_but_what_it_keeps_also_after_a_restart(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 4 * CHUNK)
    base, middle, last = [await store.put_bytes(bytes([i]) * CHUNK) for i in range(3)]
    for blob in (base, middle, last):
        store.pin(blob, "deal")
    store.pin(base, "other")
    again = BlobStore(tmp_path, 4 * CHUNK)
    again.release("deal", keep=last)
    assert again.evict(bytes_wanted=3 * CHUNK) == CHUNK
    assert [again.has(blob) for blob in (base, middle, last)] == [True, False, True]


async def test_a_full_store_refuses_and_loses_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 2 * CHUNK)
    kept = [await store.put_bytes(bytes([i]) * CHUNK) for i in range(2)]
    store.pin(kept[0])
    with pytest.raises(DiskFull) as refused:
        await store.put_bytes(b"x" * (CHUNK + 1))
    assert refused.value.next_step and all(map(store.has, kept)) and store.total_bytes() == 2 * CHUNK


async def test_a_full_disk_is_said_with_the_cure_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path, 10 * CHUNK)
    kept = await store.put_bytes(b"kept")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="df -h"):
            await store.put_bytes(b"other")
    assert store.path(kept).read_bytes() == b"kept" and not list((tmp_path / "blobs").glob("*.new"))
    assert store.has(await store.put_bytes(b"other")) and store.total_bytes() == 9


async def test_what_a_crash_left_half_done_is_cleaned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK)
    blob = await store.put_bytes(b"whole")
    (tmp_path / "blobs" / "abc.new").write_bytes(b"half")
    (tmp_path / "blobs" / f"{'0' * 64}.data").write_bytes(b"data without its manifest")
    again = BlobStore(tmp_path, CHUNK)
    assert again.has(blob) and again.total_bytes() == 5
    assert len(list((tmp_path / "blobs").iterdir())) == 2


async def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK)
    blob = await store.put_bytes(b"x")
    (tmp_path / "blobs" / f"{blob.hex()}.manifest").write_bytes(b"nonsense")
    with pytest.raises(CorruptStore):
        store.manifest(blob)


# --- fetching, over streams in memory ---------------------------------------------------------------------------

Tamper = Callable[[bytes], bytes]


class Half:
    """One end of a stream in memory, with a place to change or stop what is received."""

    def __init__(self, stream: trio.abc.Stream, tamper: Tamper) -> None:
        self.stream, self.tamper = stream, tamper

    async def receive_some(self, bytes_max: int) -> bytes:
        return bytes(await self.stream.receive_some(bytes_max))

    async def send_all(self, data: bytes | memoryview) -> None:
        await self.stream.send_all(self.tamper(bytes(data)))


class Peers:
    """A BlobHost whose peers are stores in this process."""

    def __init__(self, nursery: trio.Nursery, stores: dict[bytes, BlobStore]) -> None:
        self.nursery, self.stores = nursery, stores
        self.tampers: dict[bytes, Tamper] = {}
        self.penalties: list[bytes] = []
        self.opened: list[bytes] = []

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
        self.opened.append(peer)
        if peer not in self.stores:
            raise PeerUnreachable("nobody there")
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self._serve, peer, Half(theirs, self.tampers.get(peer, lambda data: data)))
        return Stream(Half(ours, lambda data: data))

    async def _serve(self, peer: bytes, half: Half) -> None:
        try:
            await self.stores[peer].serve(peer, Stream(half))
        except (PeerUnreachable, EOFError):
            pass
        finally:
            await half.stream.aclose()

    def penalise(self, peer: bytes, reason: str) -> None:
        self.penalties.append(peer)


def after(chunks: int, then: Tamper) -> Tamper:
    """Pass the first `chunks` chunks on unchanged, then do `then` to every one."""
    seen = [0]

    def tamper(data: bytes) -> bytes:
        if len(data) < 1000:
            return data
        seen[0] += 1
        return data if seen[0] <= chunks else then(data)

    return tamper


def broken(data: bytes) -> bytes:
    raise EOFError


async def stores(tmp_path: Path, data: bytes) -> tuple[BlobStore, dict[bytes, BlobStore], bytes]:
    servers = {peer: BlobStore(tmp_path / peer[:1].hex(), 100 * CHUNK) for peer in (GOOD, BAD)}
    ids = {await server.put_bytes(data) for server in servers.values()}
    return BlobStore(tmp_path / "own", 100 * CHUNK), servers, ids.pop()


async def test_a_blob_arrives_whole_and_progress_is_told(tmp_path: Path) -> None:
    data = random_bytes(5 * CHUNK + 3)
    own, servers, blob = await stores(tmp_path, data)
    told: list[tuple[int, int]] = []
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        path = await own.fetch(host, blob, [GOOD], size_max=len(data), progress=lambda *news: told.append(news))
        nursery.cancel_scope.cancel()
    assert path.read_bytes() == data and own.manifest(blob).size == len(data)
    assert told[0] == (0, len(data)) and told[-1] == (len(data), len(data)) and told == sorted(told)
    assert host.penalties == [] and not list((tmp_path / "own" / "partial").iterdir())


async def test_a_wrong_chunk_is_penalised_and_the_next_peer_goes_on(tmp_path: Path) -> None:
    data = random_bytes(6 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    told: list[tuple[int, int]] = []
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        host.tampers[BAD] = after(3, lambda chunk: bytes(len(chunk)))
        await own.fetch(host, blob, [BAD, GOOD], size_max=len(data), progress=lambda *news: told.append(news))
        nursery.cancel_scope.cancel()
    assert own.path(blob).read_bytes() == data
    assert host.penalties == [BAD] and host.opened == [BAD, GOOD]
    restarts = [here for (here, _), (before, _) in zip(told[1:], told, strict=False) if here <= before]
    assert restarts and restarts[0] >= CHUNK, f"good chunks of the bad peer were fetched again: {told}"


async def test_a_download_that_breaks_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = random_bytes(6 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        host.tampers[BAD] = after(4, broken)
        with pytest.raises(NotFound, match="ended after 0 of"):
            await own.fetch(host, blob, [DEAD, BAD], size_max=len(data))
        nursery.cancel_scope.cancel()
    assert not own.has(blob) and host.penalties == []
    # A new process, another peer: only what is missing travels.
    sent = [0]

    def count(chunk: bytes) -> bytes:
        sent[0] += len(chunk) >= 1000
        return chunk

    again = BlobStore(tmp_path / "own", 100 * CHUNK)
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        host.tampers[GOOD] = count
        assert (await again.fetch(host, blob, [GOOD], size_max=len(data))).read_bytes() == data
        nursery.cancel_scope.cancel()
    assert sent[0] == 2


async def test_a_damaged_partial_file_is_fetched_again_where_it_is_damaged(tmp_path: Path) -> None:
    data = random_bytes(3 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    (tmp_path / "own" / "partial" / f"{blob.hex()}.data").write_bytes(data[:CHUNK] + bytes(3 * CHUNK))
    async with trio.open_nursery() as nursery:
        assert (await own.fetch(Peers(nursery, servers), blob, [GOOD], size_max=len(data))).read_bytes() == data
        nursery.cancel_scope.cancel()


async def test_calls_for_one_blob_share_one_download(tmp_path: Path) -> None:
    data = random_bytes(3 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    async with trio.open_nursery() as outer:
        host = Peers(outer, servers)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(lambda: own.fetch(host, blob, [GOOD], size_max=len(data)))
        outer.cancel_scope.cancel()
    assert own.has(blob) and host.opened == [GOOD]


async def test_who_waits_for_a_cancelled_download_does_it_itself(tmp_path: Path) -> None:
    data = random_bytes(3 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    async with trio.open_nursery() as outer:
        host = Peers(outer, servers)
        with trio.CancelScope() as first:

            def stop(here: int, total: int) -> None:
                first.cancel()

            async with trio.open_nursery() as nursery:
                outer.start_soon(lambda: own.fetch(host, blob, [GOOD], size_max=len(data)))
                nursery.start_soon(lambda: own.fetch(host, blob, [GOOD], size_max=len(data), progress=stop))
        with trio.fail_after(10):
            await own.fetch(host, blob, [GOOD], size_max=len(data))
        outer.cancel_scope.cancel()
    assert own.path(blob).read_bytes() == data


async def test_the_true_manifest_of_too_large_a_blob_is_nobodys_fault(tmp_path: Path) -> None:
    own, servers, blob = await stores(tmp_path, bytes(CHUNK + 1))
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        with pytest.raises(LimitExceeded, match="at most"):
            await own.fetch(host, blob, [GOOD], size_max=CHUNK)
        nursery.cancel_scope.cancel()
    assert host.penalties == [] and not list((tmp_path / "own" / "partial").iterdir())


async def test_a_false_manifest_is_penalised(tmp_path: Path) -> None:
    own, servers, blob = await stores(tmp_path, bytes(10))
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        host.tampers[BAD] = lambda data: data.replace(b"ichiba", b"bahici")
        with pytest.raises(NotFound):
            await own.fetch(host, blob, [BAD], size_max=CHUNK)
        nursery.cancel_scope.cancel()
    assert host.penalties == [BAD]


async def test_a_server_that_is_busy_or_lacks_it_is_not_penalised(tmp_path: Path) -> None:
    own, servers, blob = await stores(tmp_path, bytes(10))
    servers[BAD].evict(bytes_wanted=10)
    servers[GOOD]._serving[b""] = params.BLOB_STREAMS_PER_PEER_MAX
    servers[GOOD]._serving[GOOD] = params.BLOB_STREAMS_PER_PEER_MAX
    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        with pytest.raises(NotFound, match=r"does not have it.*busy"):
            await own.fetch(host, blob, [BAD, GOOD], size_max=CHUNK)
        nursery.cancel_scope.cancel()
    assert host.penalties == []


async def test_an_asker_beyond_the_last_chunk_is_refused(tmp_path: Path) -> None:
    _, servers, blob = await stores(tmp_path, bytes(10))
    ours, theirs = trio.testing.memory_stream_pair()
    stream = Stream(Half(ours, lambda data: data))
    await stream.send_all(blob + (1).to_bytes(4, "big"))
    with pytest.raises(MalformedRecord, match="chunk 1 of a blob of 1"):
        await servers[GOOD].serve(BAD, Stream(Half(theirs, lambda data: data)))


async def test_a_full_disk_during_a_download_keeps_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(4 * CHUNK)
    own, servers, blob = await stores(tmp_path, data)
    pwrite, written = os.pwrite, [0]

    def filling(descriptor: int, view: memoryview, offset: int) -> int:
        written[0] += 1
        if written[0] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, view, offset)

    async with trio.open_nursery() as nursery:
        host = Peers(nursery, servers)
        with monkeypatch.context() as patched, pytest.raises(DiskFull):
            patched.setattr(os, "pwrite", filling)
            await own.fetch(host, blob, [GOOD], size_max=len(data))
        assert host.penalties == []
        assert (await own.fetch(host, blob, [GOOD], size_max=len(data))).read_bytes() == data
        nursery.cancel_scope.cancel()


async def test_a_download_has_more_on_its_way_than_other_streams_may(tmp_path: Path) -> None:
    """A megabyte a round trip is 10 MB/s at 100 ms: a checkpoint on a quick but long link took twice its time."""
    own, servers, blob = await stores(tmp_path, random_bytes(12 * CHUNK))
    async with two_sessions() as (one, other), trio.open_nursery() as nursery:
        ours = await one.open_stream()
        theirs = await other.accept_stream()

        class Muxed(Peers):
            async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
                self.nursery.start_soon(servers[peer].serve, peer, Stream(theirs))
                return Stream(ours)

        await own.fetch(Muxed(nursery, servers), blob, [GOOD], size_max=12 * CHUNK)
        assert params.MUX_WINDOW_BYTES_MAX < ours.receive_window <= params.BLOB_STREAM_WINDOW_BYTES
        nursery.cancel_scope.cancel()
