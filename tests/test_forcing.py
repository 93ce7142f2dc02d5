"""Errors ordered in a simulated swarm: a finder gets the jackpot, nobody is slashed, the job ends as if none was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import msgspec
import pytest

from market.entries import POOL
from peer.events import Input, SegmentMade, Send
from peer.messages import BeaconAsk, BeaconGiven, CorrectionAsk, ForcedTell, unpack
from peer.node import Node
from peer.simulator import Faults, SimulatedPeer, Simulation
from protocol.bundle import BundleReport, make_bundle, verify_bundle
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.forced import open_beacon
from protocol.lifecycle import State
from protocol.network import dump
from protocol.records import Forced, open_record, seal
from tests.bundle_forge import plain
from tests.forced_swarm import CALM, FORCED_RULES, run_job, swarm
from tests.swarm_scenario import make_swarm

HONEST: dict[str, str] = {}


def honest_root() -> str:
    """Where the job ends in a swarm without notaries, in which nothing is ordered."""
    if not HONEST:
        HONEST["root"] = str(run_job(make_swarm(1, CALM))["final_root"])
    return HONEST["root"]


def said(simulation: Simulation, kind: str, who: str = "") -> list[dict[str, Any]]:
    return [data for _, name, what, data in simulation.log if what == kind and who in ("", name)]


def proved(simulation: Simulation) -> BundleReport:
    node = simulation.peers["alice"].node
    assert node is not None
    job = next(reversed(node.jobs.jobs)).hex()
    evidence = plain(simulation.command("alice", "bundle", {"job": job}).result)
    return verify_bundle(make_bundle(evidence, network=dump(simulation.network), state={}), simulation.network.id)


def check_done(state: dict[str, Any]) -> None:
    """Whatever happened: done as an honest job is, and nobody slashed."""
    assert (state["state"], state["slashed_micro"]) == ("done", 0), state
    assert state["final_root"] == honest_root()


def check_end(simulation: Simulation, state: dict[str, Any]) -> BundleReport:
    """As `check_done`, and proved offline."""
    check_done(state)
    report = proved(simulation)
    assert report.complete
    assert report.final_root.hex() == honest_root()
    return report


@pytest.mark.parametrize("seed", range(4))
def test_a_job_with_an_ordered_error_ends_where_an_honest_one_does(seed: int) -> None:
    simulation = swarm(seed)
    report = check_end(simulation, run_job(simulation))
    (ordered,) = said(simulation, "ordered-error", "bob")
    assert said(simulation, "corrected", "alice"), "the true work was re-executed"
    assert [deal.ordered for deal in report.deals] == [ordered["segment"]]
    assert ordered["segment"] in report.segments_checked
    assert any("is no fraud" in line for line in report.proved())
    assert simulation.penalties == []


def test_nothing_is_ordered_without_notaries_or_at_rate_zero() -> None:
    for simulation in (
        swarm(1, count=0),
        swarm(1, rules=msgspec.structs.replace(FORCED_RULES, forced_ppm=0)),
    ):
        state = run_job(simulation)
        assert not said(simulation, "ordered-error")
        assert (state["state"], state["final_root"]) == ("done", honest_root())


# --- who finds it ------------------------------------------------------------------------------------------
class LazySwarm(Simulation):
    """Verifiers that sign what a receipt says instead of running it."""

    lazy: frozenset[str] = frozenset(("victor", "vera"))

    def _handle(self, peer: SimulatedPeer, event: Input) -> None:
        if peer.name in self.lazy and peer.node is not None and isinstance(event, SegmentMade):
            case = next((c for c in peer.node.checker.cases.values() if c.work == event.work), None)
            if case is not None:
                event = replace(event, out_root=case.out_root(event.segment))
        super()._handle(peer, event)


# No network may have these rules: they fill the pool in one job, so that the next one's jackpot can be seen.
RICH_POOL = msgspec.structs.replace(
    FORCED_RULES, pool_permille=500, audit_permille=1000, check_permille=1000, newcomer_permille=1000
)


def jackpot_of(simulation: Simulation) -> dict[str, int]:
    """What each checker has beside its fees of two jobs; a jackpot takes a pool, which the first job fills."""
    node = simulation.peers["alice"].node
    assert node is not None
    ledger = node.desk.ledger
    fees = [fee for data in said(simulation, "settled", "alice") for fee in data["fees"]]
    names = {peer.key.public: name for name, peer in simulation.peers.items()}
    free = {names[a.owner]: m for a, m in ledger.balances().items() if a.bucket == "free" and a.owner in names}
    assert ledger.balance_micro(POOL) >= 0
    return {
        name: free.get(name, 0) - sum(f["micro"] for f in fees if names[f["peer"]] == name)
        for name in ("victor", "vera", "wendy")
    }


def test_an_honest_verifier_gets_the_jackpot() -> None:
    simulation = swarm(3, rules=msgspec.structs.replace(RICH_POOL, audit_permille=0))
    check_done(run_job(simulation))
    assert sum(jackpot_of(simulation).values()) == 0, "the pool was empty"
    check_done(run_job(simulation))
    won = jackpot_of(simulation)
    assert sorted(won.values()) == [0, 0, won["victor"] + won["vera"]]
    assert won["victor"] + won["vera"] > 0


def test_a_lazy_verifier_misses_it_and_a_whistleblower_gets_the_jackpot() -> None:
    calm = swarm(0, rules=RICH_POOL)
    simulation = LazySwarm(
        seed=0,
        keys={name: peer.key for name, peer in calm.peers.items()},
        peers={name: peer.means for name, peer in calm.peers.items()},
        network=calm.network,
        faults=CALM,
    )
    won: dict[str, int] = {}
    for _ in range(8):  # one drawn segment is audited: the whistleblower meets the error in one job of three
        check_done(run_job(simulation))
        won = jackpot_of(simulation)
        if won["wendy"]:
            break
    assert won["wendy"] > 0
    assert (won["victor"], won["vera"]) == (0, 0)
    assert not any(v["finding"] == "wrong" for v in said(simulation, "verdict") if v["role"] == "verifier")


# --- what may go wrong -------------------------------------------------------------------------------------
def bob_deal(simulation: Simulation) -> Any:
    node = simulation.peers["bob"].node
    return next(iter(node.solver.deals.values()), None) if node is not None else None


POINTS: dict[str, Callable[[Any], bool]] = {
    "ordered": lambda deal: deal.ordered is not None,
    "told": lambda deal: bool(deal.forced),
    "offered": lambda deal: bool(deal.forced) and deal.receipts > 0,
    "proved": lambda deal: deal.lifecycle == State.PROVED,
    "drawn": lambda deal: deal.lifecycle == State.CHECKING,
}


@pytest.mark.parametrize("back", [True, False], ids=["returns", "gone"])
@pytest.mark.parametrize("point", POINTS)
def test_a_solver_that_dies_at_any_point_is_no_cheat_and_the_job_ends_right(point: str, back: bool) -> None:
    simulation = swarm(1)  # the last segment's end is ordered to be wrong: the one a job builds on
    crashed: list[str] = []

    def strike() -> bool:
        deal = bob_deal(simulation)
        if not crashed and deal is not None and POINTS[point](deal):
            simulation.crash("bob", for_ns=8 * 10**9 if back else 0)
            crashed.append(point)
        return False

    run, simulation.run = (
        simulation.run,
        lambda *, seconds, until=None: run(  # type: ignore[method-assign]
            seconds=seconds, until=lambda: strike() or bool(until is not None and until())
        ),
    )
    state = run_job(simulation)
    assert crashed, "the point was reached"
    check_end(simulation, state)


@pytest.mark.parametrize("seed", range(3))
def test_lost_and_doubled_messages_and_crashes_change_nothing(seed: int) -> None:
    faults = Faults(loss=0.2, duplication=0.3, delay_ns_max=10**9, crash=0.002 if seed % 2 else 0.0)
    simulation = swarm(seed, faults)
    check_end(simulation, run_job(simulation))


def test_a_true_end_that_is_not_true_is_not_built_on() -> None:
    simulation = swarm(1)
    forcing = simulation.peers["bob"].node.forcing  # type: ignore[union-attr]
    end_of = forcing.end_of

    def lying(deal: Any, event: SegmentMade) -> SegmentMade:
        if event.false_root and not deal.forced:
            out, blob = blake("no work"), blake("no work blob")
            simulation.roots[blob] = out
            simulation.peers["bob"].blobs.add(blob)
            event = replace(event, out_root=out, checkpoint=blob)
        return end_of(deal, event)

    forcing.end_of = lying  # type: ignore[method-assign]
    state = run_job(simulation)
    check_end(simulation, state)
    lied = next(iter(node_of(simulation, "bob").solver.deals))
    assert lied not in [data["deal"] for data in said(simulation, "corrected", "alice")]
    assert state["retried"] == 1, "its segment was done again, by a solver that did it"


# --- notaries ----------------------------------------------------------------------------------------------
def node_of(simulation: Simulation, name: str) -> Node:
    node = simulation.peers[name].node
    assert node is not None
    node.desk.effects.clear()
    return node


def test_notaries_keep_what_was_ordered_and_refuse_what_was_not() -> None:
    simulation = swarm(1)
    run_job(simulation)
    notary, bob = node_of(simulation, "notary0"), simulation.peers["bob"]
    (deal,) = node_of(simulation, "bob").solver.deals.values()
    record, _, _ = open_record(deal.forced, network=simulation.network.id)
    assert isinstance(record, Forced)
    found = [segment for segment in range(8) if notary.forcing.ordered(deal.id, segment)]
    assert found == [record.segment, record.segment + 1]
    assert notary.forcing.ordered(bytes(32), record.segment) is None
    shares = tuple(deal.beacons)
    other = node_of(simulation, "notary1")

    def tell(given: tuple[bytes, ...], **fields: Any) -> None:
        changed = msgspec.structs.replace(record, **fields)
        other.forcing.on_tell(bob.key.public, ForcedTell(seal(changed, bob.key), given))

    tell(shares)
    with pytest.raises(VerificationFailed, match="a second"):
        tell(shares, true_root=bytes(32))
    other.forcing.kept.clear()
    for fields, given in (
        ({"secret": bytes(32)}, shares),
        ({"segment": (record.segment + 1) % 6}, shares),
        ({"true_root": record.false_root}, shares),
        ({}, shares[:2]),
    ):
        with pytest.raises(VerificationFailed):
            tell(given, **fields)
    again = replace_node(simulation, "notary0")
    assert again.forcing.ordered(deal.id, record.segment) == record, "a restart forgets no order"
    again.settler.channels[deal.id].findings.clear()
    with pytest.raises(VerificationFailed, match="nobody has checked"):
        again.forcing.on_correction_ask(simulation.peers["alice"].key.public, CorrectionAsk(deal.id, ()))
    with pytest.raises(VerificationFailed):
        again.forcing.on_correction_ask(bob.key.public, CorrectionAsk(deal.id, ()))


def replace_node(simulation: Simulation, name: str) -> Node:
    """The node of a peer after a restart."""
    simulation.crash(name, for_ns=10**9)
    simulation.run(seconds=10)
    return node_of(simulation, name)


def share_of(notary: Node, peer: SimulatedPeer, message: BeaconAsk) -> BeaconGiven | None:
    """What a notary answers."""
    notary.desk.effects.clear()
    notary.beacons.on_ask(peer.key.public, message)
    (sent,) = [unpack(effect.data) for effect in notary.desk.effects if isinstance(effect, Send)] or [None]
    assert sent is None or isinstance(sent, BeaconGiven)
    return sent


def test_a_notary_gives_randomness_once_and_for_one_proof() -> None:
    simulation = swarm(1)
    run_job(simulation)
    notary = node_of(simulation, "notary0")
    alice, bob = (simulation.peers[name] for name in ("alice", "bob"))
    (deal,) = node_of(simulation, "alice").submitter.deals.values()
    named = notary.beacons.given.get(deal.id, ())
    judges = sorted(simulation.network.notary_keys)
    sets = [tuple(n for n in judges if n != left) for left in judges]
    sets = [chosen for chosen in sets if notary.desk.me in chosen]

    def answers(peer: SimulatedPeer, message: BeaconAsk) -> tuple[bytes, ...]:
        given = share_of(notary, peer, message)
        return given.notaries if given else ()

    first = named or sets[0]
    assert answers(bob, BeaconAsk(deal.id, first, b"", ())) == first, "asked again, it says the same"
    other = next(chosen for chosen in sets if chosen != first)
    assert answers(bob, BeaconAsk(deal.id, other, b"", ())) == first, "no second throw while the first can be had"
    gone = next(n for n in first if n != notary.desk.me)
    since = notary.desk.peers.pop(gone)
    assert answers(bob, BeaconAsk(deal.id, other, b"", ())) == other, "a notary is gone: others may stand in"
    notary.desk.peers[gone] = since
    reveals = (deal.own_reveal, deal.other_reveal)
    assert answers(alice, BeaconAsk(deal.id, first, deal.proof, reveals)) in ((), *sets)
    proof, _, _ = open_record(deal.proof, network=simulation.network.id)
    rolled = seal(msgspec.structs.replace(proof, root=bytes(32)), bob.key)  # type: ignore[type-var]
    for sender, message in (
        (alice, BeaconAsk(deal.id, first, rolled, reveals)),  # the seeds speak of another proof
        (alice, BeaconAsk(deal.id, first, deal.proof, reveals[:1])),  # a seed left out
        (bob, BeaconAsk(deal.id, first, deal.proof, reveals)),
        (alice, BeaconAsk(deal.id, first, b"", ())),
        (bob, BeaconAsk(deal.id, first[:2], b"", ())),
        (bob, BeaconAsk(deal.id, (notary.desk.me,) * 3, b"", ())),
    ):
        with pytest.raises(VerificationFailed):
            notary.beacons.on_ask(sender.key.public, message)
    assert answers(bob, BeaconAsk(bytes(32), first, b"", ())) == (), "of no agreement it knows"


class Split:
    """Four notaries asked for the beacon of one agreement, each quorum of three of them, in the deal's order."""

    def __init__(self) -> None:
        self.simulation = swarm(1)
        run_job(self.simulation)
        self.notaries = [node_of(self.simulation, f"notary{number}") for number in range(4)]
        self.bob, self.asker = self.simulation.peers["bob"], node_of(self.simulation, "bob")
        (self.deal,) = self.asker.solver.deals.values()
        for notary in self.notaries:
            notary.beacons.given.clear()
        self.notaries.sort(key=lambda notary: blake("ichiba/beacon-order", self.deal.id, notary.desk.me))
        keys = [notary.desk.me for notary in self.notaries]
        self.quorums = [tuple(sorted(key for key in keys if key != left)) for left in reversed(keys)]

    def sign(self, place: int, quorum: int, *seen: BeaconGiven) -> BeaconGiven:
        """The answer of a notary that is asked for a quorum, both by their places in the order."""
        ask = BeaconAsk(self.deal.id, self.quorums[quorum], b"", (), seen)
        given = share_of(self.notaries[place], self.bob, ask)
        assert given is not None
        return given


def test_notaries_that_signed_for_several_quorums_still_come_to_one_beacon() -> None:
    split = Split()
    agreement, network = split.asker.settler.channels[split.deal.id].agreement, split.simulation.network
    for quorums in product(range(4), repeat=4):
        if any(place + quorum == 3 for place, quorum in enumerate(quorums)):
            continue  # no notary signs for a quorum without itself
        got: list[list[bytes]] = []
        for place, quorum in enumerate(quorums):
            split.notaries[place].beacons.given.clear()
            assert split.sign(place, quorum).notaries == split.quorums[quorum]
        split.asker.beacons.ask(split.deal.id, agreement, got.append)
        split.simulation.run(seconds=15)
        assert len(got) == 1, f"{quorums} wait for each other"
        open_beacon(got[0], target=split.deal.id, agreement=agreement, network=network)


def test_no_share_of_another_quorum_frees_a_notary_of_a_beacon_that_may_be_had() -> None:
    split = Split()
    first, stranger, lower = split.sign(0, 1), split.sign(2, 2), split.sign(1, 0)
    forged = msgspec.structs.replace(lower, notaries=split.quorums[2])
    for seen in ((), (first,), (stranger,), (lower,), (forged,), (forged, lower, stranger)):
        for quorum in (0, 2):
            assert split.sign(0, quorum, *seen) == first, "all whom it signed with can still sign"
    later = split.sign(3, 2)
    assert split.sign(0, 0, later) == first, "never back to an earlier one"
    assert split.sign(0, 2, later).notaries == split.quorums[2], "a member of its quorum signed for a later one"
    assert split.sign(0, 1).notaries == split.quorums[2]
