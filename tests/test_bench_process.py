"""The bench process: what it makes passes the check, what goes wrong in it is told, and it never outlives its owner."""

from __future__ import annotations

import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from peer.bench_process import BenchFailed, BenchRunner, open_bench
from peer.blobs import BlobStore
from peer.events import (
    BenchEnded,
    BenchFilled,
    BenchMade,
    BenchWarm,
    CheckWork,
    Input,
    MemoryOpened,
    OpenMemory,
    StartBench,
    StopBench,
    WarmBench,
    WorkChecked,
)
from protocol.bench_card import check_opening, check_work, reference_result
from tests.bench_scene import challenge, challenge_id
from worker.bench import Fill, Filled, Open, Opened


async def test_memory_is_filled_and_opened_by_order_and_progress_is_told() -> None:
    moved: list[tuple[int, int]] = []
    async with open_bench() as bench:
        filled = await bench.order(Fill(bytes(32), 50), Filled, lambda done, total: moved.append((done, total)))
        opened = await bench.order(Open((7, 49)), Opened)
    assert moved[-1] == (50, 50)
    for index, opening in zip((7, 49), opened.openings, strict=True):
        check_opening(opening, index=index, root=filled.root, count=50, challenge_id=bytes(32))


async def test_a_process_that_dies_is_told_with_its_cause() -> None:
    async with open_bench() as bench:
        bench._process.send_signal(signal.SIGKILL)
        with pytest.raises(BenchFailed, match="want of memory"):
            await bench.order(Fill(bytes(32), 50), Filled)


async def test_leaving_the_block_ends_the_process_whatever_it_does() -> None:
    with trio.CancelScope() as scope:
        async with open_bench() as bench:
            process = bench._process
            await bench.order(Fill(bytes(32), 10**5), Filled, lambda done, total: scope.cancel())
    assert scope.cancelled_caught
    assert process.returncode is not None


async def test_an_order_that_fails_is_an_error_not_a_hang() -> None:
    async with open_bench() as bench:
        with pytest.raises(BenchFailed, match="status 1"):
            await bench.order(Open((0,)), Opened)  # nothing is filled


class NoHost:
    """Nobody is connected: every blob must be here."""

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Any:
        from peer.links import PeerUnreachable

        raise PeerUnreachable("nobody is connected")

    def penalise(self, peer: bytes, reason: str) -> None:
        raise AssertionError(reason)


Take = Callable[[type[Any]], Any]


@asynccontextmanager
async def runner(path: Path) -> AsyncIterator[tuple[BenchRunner, BlobStore, Take]]:
    blobs = BlobStore(path / "blobs", 1 << 30)
    send, receive = trio.open_memory_channel[Input](10)

    async def take(kind: type[Any]) -> Any:
        event = await receive.receive()
        assert isinstance(event, kind), event
        return event

    async with trio.open_nursery() as nursery:
        yield BenchRunner(NoHost(), blobs, nursery, send, trio.Lock()), blobs, take  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


async def test_the_daemon_makes_what_a_challenger_accepts(tmp_path: Path) -> None:
    terms = challenge(links=2, memory_blocks=30)
    one = challenge_id(terms)
    async with runner(tmp_path) as (bench, blobs, take):
        bench.perform(WarmBench())
        warm = await take(BenchWarm)
        assert warm.operations_per_second > 0
        assert warm.figures.memory_bytes > 0
        bench.perform(StartBench(one, terms))
        made = await take(BenchMade)
        evidence = blobs.path(made.evidence).read_bytes()
        check_work(terms, one, evidence, randbytes=secrets.token_bytes)
        assert evidence == reference_result(terms, one)
        filled = await take(BenchFilled)
        bench.perform(OpenMemory(one, (29,)))
        opened = await take(MemoryOpened)
        check_opening(opened.openings[0], index=29, root=filled.root, count=30, challenge_id=one)
        bench.perform(CheckWork(one, terms, made.evidence))
        assert await take(WorkChecked) == WorkChecked(one, "", False)
        bench.perform(StopBench())


async def test_wrong_evidence_is_forged_and_missing_evidence_is_not(tmp_path: Path) -> None:
    terms = challenge(links=2)
    async with runner(tmp_path) as (bench, blobs, take):
        wrong = await blobs.put_bytes(reference_result(challenge(links=1), challenge_id(terms)))
        bench.perform(CheckWork(challenge_id(terms), terms, wrong))
        checked = await take(WorkChecked)
        assert (checked.forged, "not the result" in checked.error) == (True, True)
        short = await blobs.put_bytes(b"short")
        bench.perform(CheckWork(challenge_id(terms), terms, short))
        assert (await take(WorkChecked)).forged
        bench.perform(CheckWork(challenge_id(terms), terms, bytes(32)))
        checked = await take(WorkChecked)
        assert (checked.forged, bool(checked.error)) == (False, True)


async def test_a_bench_that_cannot_be_made_ends_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.bench_process.sys.executable", "/bin/false")
    async with runner(tmp_path) as (bench, _, take):
        bench.perform(WarmBench())
        assert "ended with status 1" in (await take(BenchEnded)).error
        bench.perform(StartBench(bytes(32), challenge()))  # too late: dropped, not raised
