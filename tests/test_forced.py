"""Ordered errors: nobody chooses them, nobody can pretend one, and no verifier can tell one from a fraud."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from peer.deals import losses_root
from protocol import safetensors
from protocol.codec import blake
from protocol.errors import LocalProtocolError, VerificationFailed
from protocol.forced import (
    NO_ERRORS,
    beacon_subject,
    check_forced,
    draws_from,
    forced_segment,
    givers,
    may_order,
    open_beacon,
    orders_errors,
)
from protocol.keys import SigningKey, peer_name
from protocol.network import Network, Rules
from protocol.records import Agreement, Beacon, Forced, Receipt, open_record, seal
from protocol.sampling import commitment
from tests.bundle_forge import beacon_shares
from tests.test_training import gpt_task
from worker.cheats import FALSE_ENDS
from worker.training import Ordered, SegmentResult, run_segments

NOTARIES = [SigningKey.from_seed(blake("test/notary", bytes([n]))) for n in range(4)]
SECRET = blake("test/secret")
SOLVER, SUBMITTER = (SigningKey.from_seed(blake("test/peer", name)) for name in (b"solver", b"submitter"))


def network_of(ppm: int = 1_000_000, notaries: list[SigningKey] = NOTARIES) -> Network:
    return Network("forced", Rules(forced_ppm=ppm), (), (), tuple(peer_name(key.public) for key in notaries))


def agreement_of(network: Network, **fields: Any) -> Agreement:
    terms: dict[str, Any] = {
        **dict.fromkeys(("offer", "bid", "task", "base_root", "submitter_commitment", "solver_commitment"), bytes(32)),
        **dict.fromkeys(("sequence", "operations", "unit_price", "channel_micro", "lock_micro", "created_ns"), 1),
        **dict.fromkeys(("accept_before_ns", "segment_deadline_ns"), 1),
        "first_segment": 2, "last_segment": 10, "check_permille": 200, "network": network.id,
        "submitter": SUBMITTER.public, "solver": SOLVER.public,
        "forced_commitment": commitment(SECRET, agreement_salt=SOLVER.public),
    }  # fmt: skip
    return Agreement(**{**terms, **fields})


@dataclass
class Deal:
    """A deal whose error is ordered, and the record that says so."""

    network: Network
    agreement: Agreement
    id: bytes
    shares: list[bytes]
    record: Forced

    def check(self, **fields: Any) -> None:
        record = msgspec.structs.replace(self.record, **fields)
        check_forced(record, self.agreement, self.id, shares=self.shares, network=self.network)


def deal_of(ppm: int = 1_000_000, **fields: Any) -> Deal:
    network = network_of(ppm)
    agreement = agreement_of(network, **fields)
    agreement_id = open_record(seal(agreement, SOLVER), network=network.id)[1]
    shares = beacon_shares(agreement_id, NOTARIES, network)
    beacon = open_beacon(shares, target=agreement_id, agreement=agreement, network=network)
    segment = forced_segment(SECRET, beacon, first=2, last=10, ppm=1_000_000)
    assert segment is not None
    record = Forced(
        network=network.id, solver=SOLVER.public, agreement=agreement_id, segment=segment, secret=SECRET,
        false_root=bytes(32), true_root=blake("true"), checkpoint=blake("blob"), checkpoint_bytes=100,
    )  # fmt: skip
    return Deal(network, agreement, agreement_id, shares, record)


# --- randomness --------------------------------------------------------------------------------------------
def test_an_error_is_ordered_as_often_as_the_rules_say_and_anywhere() -> None:
    drawn = [forced_segment(blake("s", bytes([n % 256, n // 256])), b"b" * 32, first=2, last=10, ppm=250_000)
             for n in range(4000)]  # fmt: skip
    counts = Counter(segment for segment in drawn if segment is not None)
    assert 900 < sum(counts.values()) < 1100, "a quarter of 4,000, within 3.6 standard deviations"
    assert sorted(counts) == list(range(2, 10))
    assert max(counts.values()) < 2 * min(counts.values())
    assert forced_segment(SECRET, b"b" * 32, first=2, last=10, ppm=0) is None
    assert forced_segment(SECRET, b"", first=2, last=10, ppm=1_000_000) is None, "no beacon, no order"


def test_a_beacon_takes_a_quorum_that_was_named_before_and_is_no_party() -> None:
    network = network_of()
    terms, target = agreement_of(network), b"t" * 32
    shares = beacon_shares(target, NOTARIES, network)
    beacon = open_beacon(shares, target=target, agreement=terms, network=network)
    assert beacon == open_beacon(list(shares), target=target, agreement=terms, network=network)
    others = beacon_shares(target, sorted(NOTARIES, key=lambda k: k.public)[1:], network)
    stranger = SigningKey.from_seed(blake("test/stranger"))
    bad = {
        "too few": shares[:2],
        "one twice": [shares[0], shares[0], shares[1]],
        "another order": [shares[1], shares[0], shares[2]],
        "none": [],
        "picked from two quorums": [*shares[:2], others[-1]],
        "a stranger's": [
            *shares[:2],
            seal(Beacon(network=network.id, notary=stranger.public, subject=bytes(32)), stranger),
        ],
        "of another draw": beacon_shares(b"u" * 32, NOTARIES, network),
    }
    for what, given in bad.items():
        with pytest.raises(VerificationFailed):
            open_beacon(given, target=target, agreement=terms, network=network)
            pytest.fail(what)
    party = agreement_of(network, solver=sorted(k.public for k in NOTARIES)[0])
    with pytest.raises(VerificationFailed, match="no notary of this deal"):
        open_beacon(shares, target=target, agreement=party, network=network)
    assert beacon_subject(target, [b"a" * 32]) != beacon_subject(target, [b"b" * 32])


def test_without_a_quorum_of_notaries_nothing_is_ordered_and_seeds_alone_draw() -> None:
    lonely = network_of(notaries=NOTARIES[:1])
    own = agreement_of(lonely, solver=NOTARIES[0].public)
    assert givers(lonely, own) == ()
    assert not draws_from(lonely, own)
    assert open_beacon([], target=bytes(32), agreement=own, network=lonely) == b""
    none = network_of(notaries=[])
    assert not draws_from(none, agreement_of(none))
    with pytest.raises(VerificationFailed):
        open_beacon([b"x"], target=bytes(32), agreement=own, network=lonely)


def test_no_error_is_ordered_in_tolerant_work() -> None:
    exact, tolerant = deal_of(), deal_of(tolerance=b"t" * 32)
    assert orders_errors(exact.network, exact.agreement)
    assert not orders_errors(network_of(0), agreement_of(network_of(0)))
    assert draws_from(tolerant.network, tolerant.agreement), "its checks are drawn by notaries all the same"
    assert not orders_errors(tolerant.network, tolerant.agreement)
    exact.check()
    with pytest.raises(VerificationFailed, match="tolerant"):
        tolerant.check()


def test_a_bid_can_rule_errors_out_and_then_no_secret_orders_one() -> None:
    network = network_of()
    assert orders_errors(network, agreement_of(network))
    unit = agreement_of(network, forced_commitment=NO_ERRORS)
    assert not may_order(unit) and not orders_errors(network, unit)
    deal = deal_of()
    deal.check()
    deal.agreement = msgspec.structs.replace(deal.agreement, forced_commitment=NO_ERRORS)
    with pytest.raises(VerificationFailed):
        deal.check()


def test_only_what_was_ordered_excuses() -> None:
    deal = deal_of()
    deal.check()
    for fields in (
        {"secret": blake("another")},
        {"segment": deal.record.segment % 8 + 2 + (deal.record.segment % 8 + 2 == deal.record.segment)},
        {"agreement": bytes(32)},
        {"solver": SUBMITTER.public},
        {"true_root": deal.record.false_root},
    ):
        with pytest.raises(VerificationFailed):
            deal.check(**fields)
            pytest.fail(str(fields))
    deal.shares = beacon_shares(bytes(32), NOTARIES, deal.network)
    with pytest.raises(VerificationFailed, match="another beacon"):
        deal.check()
    with pytest.raises(VerificationFailed, match="was not ordered"):
        deal_of(0).check()
    with pytest.raises(VerificationFailed, match="script"):
        deal_of(check_permille=0).check()


# --- what a verifier sees ----------------------------------------------------------------------------------
SEEDS = range(3)


@dataclass(frozen=True)
class Seen:
    """What a verifier of one spoiled segment has: the claim, its own re-execution, and sizes of records."""

    claimed: Mapping[str, Any]
    found: Mapping[str, Any]
    start: Mapping[str, Any]
    losses_root: bytes
    found_losses_root: bytes
    record_bytes: int
    checkpoint_bytes: int

    def features(self) -> dict[str, float]:
        """Numbers a verifier could sort cases by: which tensors differ, and by how much of the honest update."""
        out: dict[str, float] = {"record": self.record_bytes, "checkpoint": self.checkpoint_bytes}
        out["losses differ"] = float(self.losses_root != self.found_losses_root)
        for name in self.found:
            wrong, right, before = (
                np.asarray(t[name], dtype=np.float64) for t in (self.claimed, self.found, self.start)
            )
            out[f"{name} differs"] = float((wrong != right).any())
            update = float(np.linalg.norm(right - before)) or 1.0
            out[f"{name} distance"] = float(np.linalg.norm(wrong - right)) / update
            out[f"{name} share"] = float((wrong != right).mean())
        return out


def seen_of(base: bytes, honest: SegmentResult, root: bytes, losses: tuple[float, ...], checkpoint: bytes) -> Seen:
    receipt = Receipt(
        network=bytes(32), agreement=bytes(32), sequence=1, previous=bytes(32), segment=1, operations=honest.operations,
        amount_micro=1, in_root=honest.in_root, out_root=root, losses_root=losses_root(losses),
        checkpoint=blake("blob", checkpoint), checkpoint_bytes=len(checkpoint), done_ns=1,
    )  # fmt: skip
    record = seal(receipt, SOLVER)
    parse = safetensors.parse
    return Seen(
        parse(checkpoint), parse(honest.checkpoint), parse(base), losses_root(losses), losses_root(honest.losses),
        len(record), len(checkpoint),
    )  # fmt: skip


def cases(seed: int) -> Iterator[list[Seen]]:
    """An ordered error, the same fraud in earnest, and what a clumsy solver would make up, from one seed."""
    task, program, arrays = gpt_task(seed=seed, mode="exact", steps=4, steps_per_segment=2)
    run: dict[str, Any] = {"task": task, "program": program, "arrays": arrays}
    (first,) = run_segments(base=None, segments=range(1), **run)
    second = {"base": first.checkpoint, "segments": range(1, 2), **run}
    (honest,) = run_segments(**second)
    for fraud in FALSE_ENDS:
        yield _cases(fraud, first.checkpoint, honest, second)


def _cases(fraud: str, base: bytes, honest: SegmentResult, second: dict[str, Any]) -> list[Seen]:
    (cheat,) = run_segments(cheat=fraud, **second)
    (ordered,) = run_segments(ordered=Ordered(1, fraud), **second)
    assert ordered.false_end is not None
    assert (ordered.out_root, ordered.checkpoint) == (honest.out_root, honest.checkpoint), "the work goes on truly"
    # The same bytes: not alike, but one and the same.
    assert (ordered.false_end.root, ordered.false_end.checkpoint) == (cheat.out_root, cheat.checkpoint)
    assert ordered.losses == cheat.losses
    noisy = {name: np.array(t) for name, t in safetensors.parse(honest.checkpoint).items()}
    name = min(n for n, t in noisy.items() if t.dtype == np.float32 and t.size > 100)
    noisy[name] = noisy[name] + np.float32(0.01)
    made_up = safetensors.write(noisy)
    claims = (
        (ordered.false_end.root, ordered.losses, ordered.false_end.checkpoint),
        (cheat.out_root, cheat.losses, cheat.checkpoint),
        (blake("noise"), honest.losses, made_up),
    )
    return [seen_of(base, honest, *claim) for claim in claims]


def best_stump(a: list[Seen], b: list[Seen]) -> float:
    """The most of `a` and `b` that one threshold on one feature sorts rightly: 0.5 to 1.0."""
    best = 0.5
    left, right = [s.features() for s in a], [s.features() for s in b]
    for name in left[0]:
        values = sorted({f[name] for f in left + right})
        for cut in values:
            share = (sum(f[name] <= cut for f in left) / len(left) + sum(f[name] > cut for f in right) / len(right)) / 2
            best = max(best, share, 1 - share)
    return best


def test_verifiers_cannot_tell_an_ordered_error_from_a_fraud() -> None:
    made = [seen for seed in SEEDS for seen in cases(seed)]
    ordered, frauds, noise = ([seen[kind] for seen in made] for kind in range(3))
    assert best_stump(ordered, frauds) == 0.5, "the same states, so no feature sorts them"
    # It can fail: what is made up without committing the fraud is told from one at once.
    assert best_stump(noise, frauds) == 1.0


def test_an_error_that_cannot_differ_is_made_by_another_fraud_and_unknown_ones_are_refused() -> None:
    task, program, arrays = gpt_task(steps=2, steps_per_segment=1)
    one: dict[str, Any] = {"task": task, "program": program, "arrays": arrays, "base": None, "segments": range(1)}
    (single,) = run_segments(ordered=Ordered(0, "skip-step"), **one)
    assert single.false_end is not None
    assert single.false_end.root == single.in_root, "the only step left out is the state it starts from"
    (other,) = run_segments(ordered=Ordered(1, "skip-step"), **one)
    assert other.false_end is None, "the error is ordered in another segment"
    with pytest.raises(LocalProtocolError):
        list(run_segments(ordered=Ordered(0, "stale-checkpoint"), **one))
    with pytest.raises(LocalProtocolError):
        list(run_segments(ordered=Ordered(0, "skip-step"), cheat="skip-step", **one))
