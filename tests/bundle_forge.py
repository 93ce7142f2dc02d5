"""Bundles made by a simulated swarm's own nodes, and a forge that changes one field of one record and signs again.

The forge holds every key, as a submitter and a solver in league with each other would hold theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from peer.simulator import Faults, Simulation
from protocol.bundle import make_bundle
from protocol.codec import blake, encode
from protocol.forced import beacon_subject, open_beacon
from protocol.keys import SigningKey, peer_name
from protocol.merkle import merkle_root
from protocol.network import Deposit, Network, Rules, dump
from protocol.profile import EXACT, combine, tolerance_id
from protocol.records import (
    Agreement,
    Beacon,
    Envelope,
    Proof,
    Receipt,
    Record,
    Reveal,
    Settlement,
    Verdict,
    Voucher,
    add_signature,
    amount_for,
    decode_body,
    record_id,
    seal,
)
from protocol.sampling import commitment, mixed, randomness, select_segments
from protocol.task import TaskSpec, task_id
from protocol.tolerance import open_profiles
from tests.swarm_scenario import make_swarm, over, submit

__all__ = ["Forge", "beacon_shares", "key_of", "made", "written"]

SEEDS = (b"a" * 32, b"b" * 32)


def plain(value: Any) -> Any:
    """The daemon's answer as the control socket gives it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def made(seed: int, faults: Faults | None = None, *, cheat: str = "") -> tuple[dict[str, Any], Simulation]:
    """The bundle of a job that a simulated swarm ran to its end and settled."""
    swarm = make_swarm(seed, faults or Faults(until_ns=0), cheat=cheat)
    swarm.run(seconds=3)
    while swarm.peers["alice"].node is None:
        swarm.run(seconds=3)
    job = submit(swarm)
    swarm.run(seconds=900, until=over(swarm, job))
    swarm.run(seconds=60)
    while swarm.peers["alice"].node is None:
        swarm.run(seconds=3)
    evidence = plain(swarm.command("alice", "bundle", {"job": job}).result)
    return make_bundle(evidence, network=dump(swarm.network), state={}), swarm


class Forge:
    """One bundle, and ways to falsify it consistently."""

    def __init__(self, bundle: dict[str, Any], swarm: Simulation) -> None:
        self.bundle, self.network = copy.deepcopy(bundle), swarm.network.id
        self.keys: dict[bytes, SigningKey] = {peer.key.public: peer.key for peer in swarm.peers.values()}

    def deal(self, number: int = 0) -> dict[str, Any]:
        """One deal's evidence, to change in place."""
        found: dict[str, Any] = self.bundle["deals"][number]
        return found

    def record(self, text: str) -> Record:
        """The record inside an envelope."""
        return decode_body(msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).body, network=self.network)

    def signers(self, text: str) -> list[bytes]:
        """Who signed it."""
        return [peer for peer, _ in msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).signatures]

    def sign(self, record: Record, *signers: bytes) -> str:
        """An envelope with these signatures."""
        envelope = seal(record, self.keys[signers[0]])
        for peer in signers[1:]:
            envelope = add_signature(envelope, self.keys[peer], network=self.network)
        return envelope.hex()

    def changed(self, text: str, **fields: Any) -> str:
        """The envelope's record with other fields, signed again by the same peers."""
        return self.sign(msgspec.structs.replace(self.record(text), **fields), *self.signers(text))

    def id_of(self, text: str) -> bytes:
        """The id of the record in an envelope."""
        return record_id(msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).body)

    def stranger(self) -> SigningKey:
        """A key nobody knows."""
        key = SigningKey.from_seed(blake("test/stranger"))
        self.keys[key.public] = key
        return key


def key_of(name: str) -> SigningKey:
    """The key of one of those who appear in a written bundle; walter is a staked checker that nobody asked."""
    return SigningKey.from_seed(blake("test/peer", name.encode()))


def written(
    task: TaskSpec,
    roots: list[bytes],
    checkpoints: list[bytes],
    rules: Rules | None = None,
    notaries: Sequence[SigningKey] = (),
    *,
    checkers: Sequence[str] = ("victor", "walter"),
    profiles: Callable[[str, TaskSpec, bytes], bytes] | None = None,
) -> tuple[dict[str, Any], Network]:
    """The evidence of an honest job as the daemon would answer it, bytes in hex, and its network.

    roots: of the state before the first segment and after each. checkpoints: their blobs, of all but the first.
    checkers: who has a stake beside the parties. profiles: gives the sealed profile that one of the first three of them
    made of a tolerant task.
    """
    rules = rules or Rules(audit_permille=0)
    alice, bob, victor = (key_of(name) for name in ("alice", "bob", "victor"))
    deposits = tuple(Deposit(peer_name(k.public), 10**9, 10**9) for k in (alice, bob, *map(key_of, checkers)))
    network = Network("test", rules, deposits, (), tuple(peer_name(key.public) for key in notaries))
    task = msgspec.structs.replace(task, network=network.id)
    sealed = [profiles(name, task, network.id) for name in checkers[:3]] if profiles else []
    tolerance = EXACT
    if sealed:
        tolerance = tolerance_id(combine(open_profiles(sealed, network=network.id, task=task_id(task))))
    each = task.operations_per_step * task.steps_per_segment
    whole = task.operations_per_step * task.steps
    terms = Agreement(
        network=network.id, offer=bytes(32), bid=bytes(32), task=task_id(task), submitter=alice.public,
        solver=bob.public, sequence=1, first_segment=0, last_segment=task.segments, base_root=roots[0],
        operations=whole, unit_price=1000, channel_micro=10**6, lock_micro=amount_for(whole, 1000) * 3,
        check_permille=200, submitter_commitment=commitment(SEEDS[0], agreement_salt=alice.public),
        solver_commitment=commitment(SEEDS[1], agreement_salt=bob.public), forced_commitment=bytes(32),
        accept_before_ns=1,
        segment_deadline_ns=1, created_ns=1, tolerance=tolerance,
    )  # fmt: skip
    both = (alice, bob)
    agreement, agreement_id = _sealed(terms, *both, *notaries)
    receipts, previous = [], bytes(32)
    for number in range(task.segments):
        receipt = Receipt(
            network=network.id, agreement=agreement_id, sequence=number, previous=previous, segment=number,
            operations=each, amount_micro=amount_for(each, 1000), in_root=roots[number], out_root=roots[number + 1],
            losses_root=bytes(32), checkpoint=checkpoints[number], checkpoint_bytes=1, done_ns=1,
        )  # fmt: skip
        envelope, previous = _sealed(receipt, *both)
        receipts.append(envelope)
    paid = amount_for(each, 1000) * task.segments
    voucher = Voucher(
        network=network.id, agreement=agreement_id, epoch=0, sequence=task.segments - 1, cumulative_micro=paid,
        cumulative_operations=whole, receipt=previous, submitter=alice.public,
    )  # fmt: skip
    proof = Proof(
        network=network.id, agreement=agreement_id, author=bob.public, receipts=task.segments,
        root=merkle_root(roots[1:]), last_receipt=previous, program=task.program,
    )  # fmt: skip
    deal = {"agreement": agreement, "receipts": receipts, "voucher": _sealed(voucher, alice)[0]}
    deal["profiles"] = [envelope.hex() for envelope in sealed]
    deal |= _ending(terms, agreement_id, proof, network, (alice, bob, victor), notaries, paid, each)
    evidence = {
        "job": "ab" * 32, "task": encode(task).hex(), "final_root": roots[-1].hex(), "deals": [deal],
        "checkpoint": checkpoints[-1].hex(),
    }  # fmt: skip
    return evidence, network


def beacon_shares(target: bytes, notaries: Sequence[SigningKey], network: Network) -> list[bytes]:
    """What the first quorum of these notaries, by key, gives for the beacon of `target`; nothing without notaries."""
    givers = sorted(notaries, key=lambda key: key.public)[: network.notary_quorum]
    subject = beacon_subject(target, [key.public for key in givers])
    return [seal(Beacon(network=network.id, notary=key.public, subject=subject), key) for key in givers]


def _ending(
    terms: Agreement, agreement: bytes, proof: Proof, network: Network, keys: tuple[SigningKey, ...],
    notaries: Sequence[SigningKey], paid: int, each: int,
) -> dict[str, Any]:  # fmt: skip
    """From the proof to the settlement. each: operations of one segment."""
    alice, bob, victor = keys
    sealed_proof, proof_id = _sealed(proof, bob)
    seeds = {alice: SEEDS[0], bob: SEEDS[1]}
    random = randomness(proof=proof_id, submitter_seed=seeds[alice], solver_seed=seeds[bob])
    shares = beacon_shares(random, notaries, network)
    drawn = select_segments(
        mixed(random, open_beacon(shares, target=random, agreement=terms, network=network)),
        first=0, last=terms.last_segment, permille=200, minimum=network.rules.check_segments_min,
    )  # fmt: skip
    checked = each * len(drawn)
    verdict = Verdict(
        network=terms.network, agreement=agreement, proof=proof_id, checker=victor.public, role="verifier",
        segments=drawn, finding="right", wrong_segment=0, claimed_root=bytes(32), found_root=bytes(32),
        operations=checked, done_ns=1, l1_ppb=10_000 if terms.tolerance != EXACT else 0,
    )  # fmt: skip
    closing = Settlement(
        network=terms.network, agreement=agreement, submitter=alice.public, solver=bob.public, paid_micro=paid,
        fees=((victor.public, amount_for(checked, 1000)),), proof=proof_id,
    )  # fmt: skip
    reveals = [
        Reveal(network=terms.network, agreement=agreement, proof=proof_id, author=key.public, seed=seed)
        for key, seed in seeds.items()
    ]
    return {
        "proof": sealed_proof,
        "reveals": [_sealed(reveal, key)[0] for reveal, key in zip(reveals, seeds, strict=True)],
        "verdicts": [_sealed(verdict, victor)[0]],
        "closing": [_sealed(closing, alice, bob)[0]],
        "beacons": [share.hex() for share in shares],
    }


def _sealed(record: Record, *keys: SigningKey) -> tuple[str, bytes]:
    envelope = seal(record, keys[0])
    for key in keys[1:]:
        envelope = add_signature(envelope, key, network=record.network)
    return envelope.hex(), record_id(encode(record))
