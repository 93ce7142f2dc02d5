"""A peer restored from an old backup, at any point of a deal's life: it listens first, and no credit is spent twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import pytest

from peer.events import Emit, GossipIn, MessageIn
from peer.messages import Records, pack
from peer.restored import RESTORED_KEY, RESTORED_TABLE
from peer.simulator import SECOND, Faults, Simulation
from protocol.codec import encode
from protocol.errors import CorruptStore
from protocol.records import Agreement, add_signature, seal
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(until_ns=0)


def go_back(simulation: Simulation, name: str, rows: dict[str, dict[bytes, bytes]], entries: list[object]) -> None:
    """Kill a peer and give it an older disk, marked as `ichiba wallet restore` marks it."""
    peer = simulation.peers[name]
    simulation.crash(name)
    peer.rows, peer.entries = copy.deepcopy(rows), list(entries)  # type: ignore[arg-type]
    peer.rows[RESTORED_TABLE] = {RESTORED_KEY: simulation.now_ns.to_bytes(8, "big")}


def done(simulation: Simulation, job: str, segments: int) -> Callable[[], bool]:
    return lambda: int(str(job_state(simulation, job).get("segments_done") or 0)) >= segments


def ended(simulation: Simulation, job: str) -> Callable[[], bool]:
    return lambda: job_state(simulation, job).get("state") in ("done", "failed")


@pytest.mark.parametrize("name", ["alice", "bob"])
@pytest.mark.parametrize(("kept", "lost"), [(0, 2), (1, 4), (2, 6), (6, 6)])
def test_money_is_right_whenever_the_backup_and_its_restoring_are(name: str, kept: int, lost: int) -> None:
    """Backed up after `kept` segments, restored after `lost` (6 and 6: before and after the settlement)."""
    simulation = make_swarm(11 + kept, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=done(simulation, job, kept))
    peer = simulation.peers[name]
    rows, entries = copy.deepcopy(peer.rows), list(peer.entries)
    simulation.run(seconds=300, until=ended(simulation, job) if kept == lost else done(simulation, job, lost))
    go_back(simulation, name, rows, entries)
    simulation.run(seconds=9)
    assert peer.node is not None
    assert peer.node.restored.listening
    simulation.run(seconds=600)
    assert not peer.node.restored.listening
    simulation.check_quiet()  # one ledger, every channel closed, every voucher that is known paid
    alice = simulation.peers["alice"].key.public
    ledger = simulation.peers["victor"].node.desk.ledger  # type: ignore[union-attr]
    spent = ledger.flows()[alice].paid_micro
    assert 0 <= spent <= 3 * 66_000, "six segments cost 60,000; begun again at another solver at most as much once more"
    assert job_state(simulation, job)["state"] in ("done", "failed", "offered", "cancelled")


def test_a_restored_peer_refuses_to_sign_until_it_has_heard() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    alice = simulation.peers["alice"]
    rows, entries = copy.deepcopy(alice.rows), list(alice.entries)
    simulation.run(seconds=300, until=ended(simulation, job))
    go_back(simulation, "alice", rows, entries)
    for other in simulation.peers:
        if other != "alice":
            simulation.crash(other, for_ns=40 * SECOND)
    simulation.run(seconds=9)
    assert alice.node is not None
    assert alice.node.restored.listening
    refused = simulation.command("alice", "cancel", {"job": job}).error
    assert refused is not None
    assert refused["code"] == "restored"
    assert refused["next"]
    assert simulation.command("alice", "wallet", {}).error is None
    before = set(alice.rows.get("settlement", ()))
    simulation.run(seconds=25)
    assert alice.node.restored.listening, "nobody is there to ask"
    simulation.run(seconds=120)
    assert not alice.node.restored.listening
    assert RESTORED_KEY not in alice.rows[RESTORED_TABLE]
    assert set(alice.rows["settlement"]) > before
    simulation.check_quiet()


def test_a_lost_deal_on_credit_that_its_partner_shows_does_not_stop_a_peer_that_listens() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    alice, bob = simulation.peers["alice"], simulation.peers["bob"]
    go_back(simulation, "alice", alice.rows, list(alice.entries))
    simulation.run(seconds=9)
    assert alice.node is not None and alice.node.restored.listening
    fields: dict[str, object] = {f.name: bytes(32) for f in msgspec.structs.fields(Agreement)}
    numbers = ("first_segment", "operations", "unit_price", "channel_micro", "lock_micro", "sequence", "check_permille")
    fields |= dict.fromkeys((*numbers, "accept_before_ns", "segment_deadline_ns", "created_ns", "last_segment"), 0)
    fields |= {"network": simulation.network.id, "credit": b"c" * 32}
    lost = Agreement(**{**fields, "submitter": alice.key.public, "solver": bob.key.public})  # type: ignore[arg-type]
    both = add_signature(seal(lost, alice.key), bob.key, network=simulation.network.id)
    for event in (
        GossipIn("settlement", bob.key.public, encode([both])),
        MessageIn(bob.key.public, pack(Records((both,)))),
    ):
        effects = alice.node.handle(event, simulation.now_ns)
        assert [e.kind for e in effects if isinstance(e, Emit)] == ["ignored"]


def test_receipts_of_finished_deals_are_read_when_they_are_asked_for() -> None:
    simulation = make_swarm(3, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=300, until=ended(simulation, job))
    simulation.run(seconds=60)
    whole = simulation.command("alice", "bundle", {"job": job}).result["deals"]
    simulation.crash("alice", for_ns=SECOND)
    simulation.run(seconds=9)
    alice = simulation.peers["alice"]
    assert alice.node is not None
    assert not alice.node.submitter.receipts.data, "none is read at the start"
    assert simulation.command("alice", "bundle", {"job": job}).result["deals"] == whole
    del alice.rows["receipts"][max(alice.rows["receipts"])]
    simulation.crash("alice", for_ns=SECOND)
    simulation.run(seconds=9)
    refused = simulation.command("alice", "bundle", {"job": job}).error
    assert refused is not None
    assert refused["code"] == CorruptStore.code
    assert "5 of 6 receipts" in refused["what"]
