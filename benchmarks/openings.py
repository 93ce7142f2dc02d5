"""How many openings a second four notaries certify, all of it in one process on one core.

Run `python benchmarks/openings.py [DIRECTORY] [--openings N] [--json]`; DIRECTORY on the disk a daemon would use.
One opening is what the protocol has for it: the submitter's question is encoded, and decoded by three notaries or four;
each verifies both parties' signatures, sets the money aside, journals that (SQLite, synchronous=FULL, a commit for each
GROUP of questions, as a daemon commits what came in together) and signs; the submitter verifies every signature and
the certificate. Nothing is remembered from one to the next: each verifies for itself. Told are openings for a second of
the clock, and for one of the processor, which another process's load does not change. The last line with --json is one
object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from market import entries as money
from market.ledger import Ledger
from peer.certificate_messages import Certified, CertifyAsk
from peer.desk import Desk, Means
from peer.events import Save
from peer.messages import pack, unpack
from peer.notary import Notary
from peer.settler import Settler
from peer.store import Batch, Store
from peer.witness import Witness
from protocol import keys, records
from protocol.certificate import attach, check_certified
from protocol.codec import blake
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.records import Agreement, add_signature, open_record, seal

SUBMITTER, SOLVER = (SigningKey.from_seed(blake("benchmark", name)) for name in (b"submitter", b"solver"))
NOTARIES = [SigningKey.from_seed(blake("benchmark", b"notary", bytes([n]))) for n in range(4)]
FREE_MICRO = 10**12
GROUP = 32  # questions that share a commit
ROUNDS = 3
NETWORK = Network(
    "benchmark",
    Rules(),
    (Deposit(peer_name(SUBMITTER.public), FREE_MICRO, 0), Deposit(peer_name(SOLVER.public), 0, FREE_MICRO)),
    notaries=tuple(peer_name(key.public) for key in NOTARIES),
)


def agreed(number: int) -> bytes:
    """An agreement with both parties' signatures."""
    digest, now_ns = blake("benchmark/opening", number.to_bytes(8, "little")), time.time_ns()
    terms = Agreement(
        network=NETWORK.id, offer=digest, bid=digest, task=digest, submitter=SUBMITTER.public, solver=SOLVER.public,
        sequence=number, first_segment=0, last_segment=10, base_root=digest, operations=10**10, unit_price=1000,
        channel_micro=1000, lock_micro=3000, check_permille=200, submitter_commitment=digest, solver_commitment=digest,
        forced_commitment=digest, accept_before_ns=now_ns, segment_deadline_ns=10**9, created_ns=now_ns,
    )  # fmt: skip
    return add_signature(seal(terms, SUBMITTER), SOLVER, network=NETWORK.id)


def notary_of(key: SigningKey) -> Notary:
    """A notary of the network that has heard of nothing but the deposits."""
    ledger = Ledger()
    ledger.post(money.deposit(bytes(32), SUBMITTER.public, FREE_MICRO, 0))
    ledger.post(money.deposit(b"1" * 32, SOLVER.public, 0, FREE_MICRO))
    desk = Desk(key=key, network=NETWORK, rng=random.Random(1), ledger=ledger, means=Means(), now_ns=time.time_ns())
    return Notary(desk, Settler(desk), Witness(desk))


def fresh() -> None:
    """Whoever verifies next has seen none of these signatures."""
    for remembered in (keys.verified, records._opened):
        remembered._new.clear()
        remembered._old.clear()


def certified(groups: list[list[bytes]], stores: list[Store], notaries: list[Notary]) -> None:
    """Ask these notaries for all, group by group, and check what comes of it."""
    for group in groups:
        answers: list[dict[bytes, bytes]] = [{} for _ in group]
        for store, notary in zip(stores, notaries, strict=True):
            fresh()
            for at, envelope in enumerate(group):
                question = unpack(pack(CertifyAsk(envelope)))
                assert isinstance(question, CertifyAsk)
                answer = unpack(pack(notary.on_ask(SUBMITTER.public, question)))
                assert isinstance(answer, Certified), answer
                answers[at][notary.desk.me] = answer.signature
            puts = tuple((e.table, e.key, e.value) for e in notary.desk.effects if isinstance(e, Save))
            store.commit([Batch(puts)])
            notary.desk.effects.clear()
        fresh()
        for envelope, signatures in zip(group, answers, strict=True):
            record, _, signers = open_record(attach(envelope, signatures), network=NETWORK.id)
            assert isinstance(record, Agreement)
            check_certified(record, signers, NETWORK)


def rate(folder: Path, count: int, notaries: int, start: int) -> tuple[float, float]:
    """Openings for a second of the clock, and of the processor, with so many notaries asked."""
    made = [agreed(start + number) for number in range(count)]
    groups = [made[at : at + GROUP] for at in range(0, count, GROUP)]
    chosen = [notary_of(key) for key in NOTARIES[:notaries]]
    with ExitStack() as stack:
        stores = [
            stack.enter_context(Store.open(folder / f"{start}-{n}", NETWORK.id, notary.desk.me))
            for n, notary in enumerate(chosen)
        ]
        begun, used = time.perf_counter(), time.process_time()
        certified(groups, stores, chosen)
        return count / (time.perf_counter() - begun), count / (time.process_time() - used)


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=None)
    parser.add_argument("--openings", type=int, default=1024, help="per measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {3: [], 4: []}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for turn in range(ROUNDS):
            for notaries, each in found.items():
                each.append(rate(Path(folder), options.openings, notaries, (turn * 10 + notaries) * 10**6))
    rates = {n: [statistics.median(column) for column in zip(*each, strict=True)] for n, each in found.items()}
    for notaries, (wall, used) in rates.items():
        print(f"{notaries} of 4 notaries asked: {wall:>6,.0f} openings/s, {used:>6,.0f} for a second of one core")
    if options.json:
        keyed = {"certified_openings_per_s": 4, "by_a_bare_quorum_per_s": 3}
        print(
            json.dumps(
                {name: round(rates[n][0]) for name, n in keyed.items()}
                | {name.replace("_per_s", "_per_core_s"): round(rates[n][1]) for name, n in keyed.items()}
            )
        )


if __name__ == "__main__":
    main()
