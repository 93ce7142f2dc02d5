"""The crash rule of the daemon's loop: in order, committed before anything leaves, nothing after a failed commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from peer import turns as module
from peer.events import Effect, Emit, Input, MessageIn, Save, Send
from peer.messages import ReceiptOffer, pack, unpack
from peer.store import Store
from peer.store_schema import StoreFailed
from peer.turns import Turns, open_clock
from peer.verifying import Verifier
from protocol import keys, params, records
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, Verified
from protocol.records import Ask, open_record, seal

NETWORK, PEER = blake("test/turns", b"network"), blake("test/turns", b"peer")
KEY = SigningKey.from_seed(b"\5" * 32)
DAY = 86_400 * 10**9


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "d", NETWORK, PEER) as opened:
        yield opened


def ask(number: int) -> bytes:
    return seal(
        Ask(
            network=NETWORK, peer=KEY.public, slot=0, sequence=number, roles=1, unit_price=1, memory_bytes=1, sandbox=4,
            operations_per_second=1, created_ns=1, expires_ns=2,
        ),
        KEY,
    )  # fmt: skip


def message(number: int, envelope: bytes = b"") -> MessageIn:
    return MessageIn(number.to_bytes(32, "big"), pack(ReceiptOffer(envelope or b"x")))


def echo(event: Input, _now_ns: int, _wall_ns: int) -> list[Effect]:
    """Keep who sent it, tell, answer."""
    assert isinstance(event, MessageIn)
    return [Save("heard", event.peer, b"1"), Emit("heard", b"job", {}), Send(event.peer, b"")]


async def run(turns: Turns, inputs: list[Input]) -> None:
    send, receive = trio.open_memory_channel[Input](len(inputs))
    for one in inputs:
        send.send_nowait(one)
    send.close()
    await turns.run(receive)


def made(store: Store, verifier: Verifier, **changes: Any) -> Turns:
    given: dict[str, Any] = {"handle": echo, "perform": lambda _: None} | changes
    return Turns(store=store, verifier=verifier, clock=open_clock(store), **given)


async def test_what_leaves_is_on_the_disk_first_and_in_order(store: Store) -> None:
    sent: list[int] = []
    told: list[int] = []

    def perform(effect: Effect) -> None:
        assert isinstance(effect, Send)
        assert store.get("heard", effect.peer) == b"1"
        sent.append(int.from_bytes(effect.peer, "big"))

    def tell(event: dict[str, Any]) -> None:
        told.append(event["seq"])
        assert store.events(b"job".hex(), limit=10_000)[-1].line

    count = 3 * params.INPUTS_PER_COMMIT_MAX + 7
    with closing(Verifier(NETWORK, threads=2)) as verifier:
        await run(made(store, verifier, perform=perform, tell=tell), [message(n) for n in range(count)])
    assert sent == list(range(count))
    assert told == sorted(set(told))
    assert len(told) == count
    assert len(store.events(b"job".hex(), limit=10_000)) == count


async def test_after_a_commit_that_fails_nothing_leaves_that_it_or_a_later_one_explains(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, commits, sent = store.commit, [0], []

    def failing(batches: Any) -> None:
        commits[0] += 1
        if commits[0] == 2:
            raise StoreFailed("the disk is gone")
        commit(batches)

    monkeypatch.setattr(store, "commit", failing)
    count = 5 * params.INPUTS_PER_COMMIT_MAX
    with closing(Verifier(NETWORK, threads=2)) as verifier, pytest.RaisesGroup(StoreFailed):
        await run(made(store, verifier, perform=sent.append), [message(n) for n in range(count)])
    assert len(sent) == params.INPUTS_PER_COMMIT_MAX
    assert commits == [2]
    assert len(list(store.rows("heard"))) == len(sent)


async def test_every_signature_is_computed_before_its_record_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Verified()
    envelopes = [ask(n) for n in range(600)]
    forged = {n: envelopes[n][:-1] + bytes([envelopes[n][-1] ^ 1]) for n in (0, 13, 256, 599)}
    monkeypatch.setattr(keys, "verified", fresh)  # who signed need not compute: another process did
    records._opened.clear()
    refused: list[int] = []

    def handle(event: Input, _now_ns: int, _wall_ns: int) -> list[Effect]:
        assert isinstance(event, MessageIn)
        offer = unpack(event.data)
        assert isinstance(offer, ReceiptOffer)
        try:
            open_record(offer.receipt, network=NETWORK)
        except VerificationFailed:
            refused.append(int.from_bytes(event.peer, "big"))
            return []
        return [Save("taken", event.peer, offer.receipt)]

    inputs: list[Input] = [message(n, forged.get(n, one)) for n, one in enumerate(envelopes)]
    with closing(Verifier(NETWORK, threads=2)) as verifier:
        await run(made(store, verifier, handle=handle), inputs)
    assert refused == sorted(forged)
    assert fresh.computed == 600 - len(forged)
    assert len(list(store.rows("taken"))) == 600 - len(forged)


async def test_the_next_life_begins_above_the_last_commit_though_the_clock_was_set_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    told: list[dict[str, Any]] = []

    def handle(event: Input, now_ns: int, wall_ns: int) -> list[Effect]:
        seen.append((now_ns, wall_ns))
        return echo(event, now_ns, wall_ns)

    real_ns = module.time.time_ns
    with closing(Verifier(NETWORK, threads=1)) as verifier:
        await run(made(store, verifier, handle=handle), [message(1)])
        monkeypatch.setattr(module.time, "time_ns", lambda: real_ns() - DAY)
        await run(made(store, verifier, handle=handle, tell=told.append), [message(2)])
    (first, _), (second, dated) = seen
    assert second > first
    assert abs(dated - (real_ns() - DAY)) < 60 * 10**9
    assert [event["kind"] for event in told] == ["problem", "heard"]
    assert "the clock jumped by -86," in told[0]["what"]
    assert told[1]["seq"] > first
    assert told[1]["time_ns"] == dated


async def test_what_is_foreseen_of_many_inputs_is_done_in_a_thread_before_they_count(store: Store) -> None:
    order: list[str] = []
    here = threading.get_ident()

    def foresee(inputs: Sequence[Input]) -> Callable[[], None]:
        assert threading.get_ident() == here
        return lambda: order.append(f"{len(inputs)} made, aside: {threading.get_ident() != here}")

    def handle(event: Input, now_ns: int, wall_ns: int) -> list[Effect]:
        order.append("handled")
        return echo(event, now_ns, wall_ns)

    count = params.SIGNATURES_AHEAD_MIN
    with closing(Verifier(NETWORK, threads=1)) as verifier:
        await run(made(store, verifier, handle=handle, foresee=foresee), [message(n) for n in range(count)])
        few = made(store, verifier, handle=handle, foresee=lambda _: pytest.fail("too few to be worth it"))
        await run(few, [message(n) for n in range(count - 1)])
    assert order == [f"{count} made, aside: True", *["handled"] * (2 * count - 1)]
