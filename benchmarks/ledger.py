"""What a receipt costs this machine from its arrival to the disk, and what a million of them cost the next start.

Run `python benchmarks/ledger.py [DIRECTORY] [--receipts N] [--old N] [--json]`; DIRECTORY should be on the disk the
daemon will use (the default is the system's folder for temporary files). A signed receipt comes as its solver sends it
and goes the daemon's way (peer/turns.py, with its threads, groups and memory of signatures): its signature is checked,
the submitter signs it and the voucher that pays for it (peer.deals.cosign), both rows are committed with SQLite's
synchronous=FULL, and then the answer leaves. What a node checks of a deal besides is not in it. Every channel of 250
receipts is opened and settled on the ledger in the same commits. The solver signs in another process, for none computes
what it signed itself; that each signature was computed is asserted. Unsigned: the same rows and entries, handed in
ready, in groups. Baseline: the unsigned ones through the same store, one commit each.

The start: `Store.open`, its ledger and `Node` over a store of `--old` receipts and vouchers with the agreements,
settlements and deals they belong to. Caches of the system stay warm, as after a crash of the daemon. The last line
with --json is one object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import msgspec
import trio

from market import ledger as money
from market.ledger import Entry
from peer.cosigning import Cosigning, cosign, cosign_ahead
from peer.deals import Deal, receipt_key
from peer.desk import Means
from peer.events import Effect, Input, MessageIn, Post, Save, Send
from peer.messages import ReceiptBack, ReceiptOffer, pack, unpack
from peer.node import Node
from peer.store import Batch, Store
from peer.store_check import check
from peer.turns import Turns, open_clock
from peer.verifying import Verifier
from protocol import keys, params
from protocol.codec import blake
from protocol.keys import SigningKey, peer_name
from protocol.lifecycle import State
from protocol.network import Network, load
from protocol.records import Agreement, Receipt, Settlement, add_signature, open_record, seal

SOLVER, SUBMITTER = (SigningKey.from_seed(blake("benchmark", name)) for name in (b"solver", b"submitter"))
PER_CHANNEL = 250  # receipts
PRICE_MICRO = 1_000  # of a receipt
GROUP = 1_000  # unsigned receipts that share a commit: 50 ms of them
ROUNDS = 3


def network_of(channels: int) -> Network:
    """A network whose deposits pay for that many channels at once."""
    free = max(1, channels) * PER_CHANNEL * PRICE_MICRO
    return load(
        f'''name = "benchmark"
[[deposits]]
peer = "{peer_name(SUBMITTER.public)}"
free_micro = {free}
[[deposits]]
peer = "{peer_name(SOLVER.public)}"
stake_micro = {free}
'''
    )


def genesis(network: Network) -> Batch:
    """The network file's deposits, as the node posts them."""
    return Batch(
        entries=tuple(
            money.deposit(blake("ichiba/genesis", network.id, key.public), key.public, free, stake, memo="network file")
            for key, free, stake in (
                (SUBMITTER, network.deposits[0].free_micro, 0),
                (SOLVER, 0, network.deposits[1].stake_micro),
            )
        )
    )


def agreement(network: Network, n: int) -> Agreement:
    """The terms of channel n."""
    digest = blake("benchmark/channel", n.to_bytes(8, "little"))
    return Agreement(
        network=network.id, offer=digest, bid=digest, task=digest, submitter=SUBMITTER.public, solver=SOLVER.public,
        sequence=n + 1, first_segment=0, last_segment=PER_CHANNEL, base_root=digest, operations=PER_CHANNEL * 10**9,
        unit_price=PRICE_MICRO, channel_micro=PER_CHANNEL * PRICE_MICRO, lock_micro=PRICE_MICRO, check_permille=100,
        submitter_commitment=digest, solver_commitment=digest, forced_commitment=digest, accept_before_ns=1,
        segment_deadline_ns=10**9, created_ns=1,
    )  # fmt: skip


def receipt(network: Network, channel: bytes, sequence: int) -> Receipt:
    """One link of a channel's chain, of the size that real ones have."""
    root = blake("benchmark/root", channel, sequence.to_bytes(8, "little"))
    return Receipt(
        network=network.id, agreement=channel, sequence=sequence, previous=root, segment=sequence, operations=10**9,
        amount_micro=PRICE_MICRO, in_root=root, out_root=root, losses_root=root, checkpoint=root,
        checkpoint_bytes=10**8, done_ns=1_790_000_000_000_000_000 + sequence,
    )  # fmt: skip


def entries_of(channel: bytes) -> tuple[Entry, Entry]:
    """The opening of a channel and its end."""
    parties = {"submitter": SUBMITTER.public, "solver": SOLVER.public}
    whole = PER_CHANNEL * PRICE_MICRO
    opening = money.open_channel(channel, budget_micro=whole, lock_micro=PRICE_MICRO, **parties)
    ending = money.settle(channel, channel_micro=whole, lock_micro=PRICE_MICRO, paid_micro=whole, **parties)
    return opening, ending


def offered(network: Network, count: int, salt: int) -> list[list[bytes]]:
    """Groups of receipts as their solver signs them, of channels no other salt has."""
    channels = [blake("benchmark/agreement", b"%d/%d" % (salt, n)) for n in range(count // PER_CHANNEL)]
    one = [seal(receipt(network, c, n), SOLVER) for n in range(PER_CHANNEL) for c in channels]
    return [one[first : first + GROUP] for first in range(0, len(one), GROUP)]


def take(network: Network, envelopes: Sequence[bytes]) -> Batch:
    """What the submitter does with signed receipts, up to the disk."""
    puts, entries = [], []
    for envelope in envelopes:
        record, record_id, signers = open_record(envelope, network=network.id)
        assert isinstance(record, Receipt)
        assert signers == {SOLVER.public}
        paid = (record.sequence + 1) * record.amount_micro
        operations = (record.sequence + 1) * record.operations
        both, voucher = cosign(envelope, record, record_id, SUBMITTER, cumulative_micro=paid, operations=operations)
        key = receipt_key(record.agreement, record.sequence)
        puts += [("receipts", key, both), ("vouchers", key, voucher)]
        if record.sequence in (0, PER_CHANNEL - 1):
            entries.append(entries_of(record.agreement)[record.sequence > 0])
    return Batch(tuple(puts), tuple(entries))


def pay(network: Network, event: Input, _now_ns: int, _wall_ns: int) -> list[Effect]:
    """What a submitter's node makes of a receipt in the end."""
    assert isinstance(event, MessageIn)
    offer = unpack(event.data)
    assert isinstance(offer, ReceiptOffer)
    batch = take(network, [offer.receipt])
    (_, _, both), (_, _, voucher) = batch.puts
    assert both and voucher
    effects: list[Effect] = [Save(*put) for put in batch.puts]
    return [*effects, *map(Post, batch.entries), Send(event.peer, pack(ReceiptBack(both, voucher)))]


def foresee(network: Network, inputs: Sequence[Input]) -> Callable[[], None]:
    """What a submitter's node would have signed ahead of these receipts (peer.submitter.Submitter.foresee)."""
    wanted = []
    for event in inputs:
        assert isinstance(event, MessageIn)
        offer = unpack(event.data)
        assert isinstance(offer, ReceiptOffer)
        record, record_id, _ = open_record(offer.receipt, network=network.id)
        assert isinstance(record, Receipt)
        count = record.sequence + 1
        wanted.append(
            Cosigning(offer.receipt, record, record_id, count * record.amount_micro, count * record.operations)
        )
    return partial(cosign_ahead, SUBMITTER, wanted)


def signed_per_second(network: Network, store: Store, groups: list[list[bytes]]) -> tuple[float, float]:
    """Receipts a second from their arrival until they are on the disk and answered, and CPU microseconds of each."""
    inputs = [MessageIn(SOLVER.public, pack(ReceiptOffer(one))) for group in groups for one in group]
    answers: list[Effect] = []

    async def feed(inbox: trio.MemorySendChannel[Input]) -> None:
        async with inbox:
            for one in inputs:
                try:
                    inbox.send_nowait(one)
                except trio.WouldBlock:
                    await inbox.send(one)

    async def drive(turns: Turns) -> None:
        inbox, waiting = trio.open_memory_channel[Input](params.INBOX_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, inbox)
            nursery.start_soon(turns.run, waiting)

    computed = keys.verified.computed
    with closing(Verifier(network.id)) as verifier:
        turns = Turns(
            handle=partial(pay, network),
            store=store,
            verifier=verifier,
            clock=open_clock(store),
            perform=answers.append,
            foresee=partial(foresee, network),
        )
        start, cpu = time.perf_counter(), time.process_time()
        trio.run(drive, turns)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(answers) == len(inputs) == keys.verified.computed - computed
    return len(inputs) / took, 1e6 * cpu / len(inputs)


def ready_per_second(store: Store, batches: Sequence[Batch]) -> float:
    """Receipts a second whose rows are made already, one commit for each batch."""
    start = time.perf_counter()
    for batch in batches:
        store.commit([batch])
    return sum(len(batch.puts) // 2 for batch in batches) / (time.perf_counter() - start)


def rates(folder: Path, receipts: int) -> dict[str, float]:
    """The medians of interleaved rounds, so that a change of the machine's load falls on all three."""
    count = max(1, receipts // GROUP) * GROUP
    network = network_of(3 * ROUNDS * count // PER_CHANNEL)
    found: dict[str, list[float]] = {"signed": [], "cpu": [], "unsigned": [], "one": []}
    with (
        Store.open(folder / "rates", network.id, SUBMITTER.public) as store,
        ProcessPoolExecutor(1, get_context("spawn")) as solver,
    ):
        store.commit([genesis(network)])
        for turn in range(ROUNDS):
            signed = solver.submit(offered, network, count, 3 * turn).result()
            for name, figure in zip(("signed", "cpu"), signed_per_second(network, store, signed), strict=True):
                found[name].append(figure)
            ready = [take(network, group) for group in offered(network, count, 3 * turn + 1)]
            found["unsigned"].append(ready_per_second(store, ready))
            singles = [take(network, [one]) for one in offered(network, GROUP, 3 * turn + 2)[0]]
            found["one"].append(ready_per_second(store, singles))
        store.ledger().check()
    return {name: statistics.median(each) for name, each in found.items()}


def history(network: Network, receipts: int) -> Iterator[Batch]:
    """A submitter's past: channels that were opened, receipted and settled, a batch each. The receipts are bytes of
    the right size, for nothing opens them at a start; all else is what the node would have written."""
    for n in range(receipts // PER_CHANNEL):
        opened = add_signature(seal(agreement(network, n), SUBMITTER), SOLVER, network=network.id)
        channel = open_record(opened, network=network.id)[1]
        closing = Settlement(
            network=network.id, agreement=channel, submitter=SUBMITTER.public, solver=SOLVER.public,
            paid_micro=PER_CHANNEL * PRICE_MICRO, fees=(), proof=bytes(32),
        )  # fmt: skip
        settled = add_signature(seal(closing, SUBMITTER), SOLVER, network=network.id)
        deal = Deal(
            id=channel, side="submitter", state=State.SETTLED, agreement=opened, task=bytes(600), base_blob=b"",
            seed=bytes(32), created_ns=1, receipts=PER_CHANNEL, settlement=settled, paid_out=True,
        )  # fmt: skip
        puts: list[tuple[str, bytes, bytes | None]] = [("deals", channel, msgspec.msgpack.encode(deal))]
        for at, envelope in enumerate((opened, settled)):  # peer.settler: time, number, stage: each came in its turn
            order = (2 * n + at).to_bytes(8, "big") + (2 * n + at + 1).to_bytes(4, "big") + bytes([0])
            puts.append(("settlement", open_record(envelope, network=network.id)[1], order + envelope))
        for sequence in range(PER_CHANNEL):
            key = receipt_key(channel, sequence)
            puts += [("receipts", key, key * 13), ("vouchers", key, key * 7)]
        yield Batch(tuple(puts), entries_of(channel))


def restart_seconds(folder: Path, receipts: int) -> tuple[float, int]:
    """Seconds from opening a store of so many old receipts to a node that can answer; and its file, in bytes."""
    network = network_of(receipts // PER_CHANNEL)
    directory = folder / "restart"
    with Store.open(directory, network.id, SUBMITTER.public) as store:
        store.commit([genesis(network)])
        for batch in history(network, receipts):
            store.commit([batch])
    start = time.perf_counter()
    check(directory)
    print(f"verified whole beside the daemon: {time.perf_counter() - start:.0f} s", flush=True)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with Store.open(directory, network.id, SUBMITTER.public) as store:
            node = Node(
                key=SUBMITTER, network=network, rng=random.Random(1), means=Means(), ledger=store.ledger(),
                rows=lambda table, prefix=b"": list(store.rows(table, prefix)), now_ns=time.time_ns(),
            )  # fmt: skip
            times.append(time.perf_counter() - start)
            assert len(node.submitter.deals) == receipts // PER_CHANNEL
            some = next(iter(node.submitter.deals))
            assert len(node.submitter.receipts[some]) == PER_CHANNEL
    return statistics.median(times), (directory / "ichiba.db").stat().st_size


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=None)
    parser.add_argument("--receipts", type=int, default=20_000, help="per measurement, in thousands")
    parser.add_argument("--old", type=int, default=1_000_000, help="receipts of the store that is opened")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        found = rates(Path(folder), options.receipts)
        print(f"signed, as they come:      {found['signed']:>9,.0f} receipts/s, {found['cpu']:.0f} us of CPU each")
        print(f"unsigned, groups of {GROUP}:  {found['unsigned']:>9,.0f} receipts/s")
        print(f"unsigned, one commit each: {found['one']:>9,.0f} receipts/s", flush=True)
        restart_s, size = restart_seconds(Path(folder), max(PER_CHANNEL, options.old))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"start with {options.old:,} receipts ({size / 1e6:,.0f} MB): {restart_s:.2f} s, {peak} MiB at most")
    if options.json:
        print(
            json.dumps(
                {
                    "durable_signed_receipts_per_s": round(found["signed"]),
                    "cpu_us_per_signed_receipt": round(found["cpu"]),
                    "durable_unsigned_receipts_per_s": round(found["unsigned"]),
                    "baseline_one_commit_each_per_s": round(found["one"]),
                    "restart_million_s": round(restart_s, 2),
                }
            )
        )


if __name__ == "__main__":
    main()
