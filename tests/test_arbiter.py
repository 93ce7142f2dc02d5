"""Disputes before notaries: whoever is right wins, whatever is lost, doubled, killed, hidden, forged or lied about."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from peer import messages as m
from peer.case import Case, open_evidence
from peer.disputant import request_of
from peer.dispute_file import SILENT
from peer.events import Emit, MessageIn, Penalise, Post, Save, Send
from peer.messages import MoveOffer, pack
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from peer.whistleblower import Prospect, Whistleblower, prospect_of
from protocol.codec import blake
from protocol.forced import NO_ERRORS
from protocol.keys import SigningKey
from protocol.network import Rules
from protocol.records import Agreement, Move, Ruling, Verdict, seal
from tests.dispute_swarm import CALM, COURT_RULES, challenger_of, court, rulings_of, settle, states_of, told
from tests.swarm_scenario import job_state, submit

SEEDS = 12
CHEAT = "skip-step"
HONEST_ROOT = "1e9220ed6681588571300c54bc9c64e5a5f17e8680fcec8f4d47c86861ee6cc4"


def node_of(simulation: Simulation, name: str) -> Node:
    node = simulation.peers[name].node
    assert node is not None
    return node


def begin(seed: int, faults: Faults = CALM, *, cheat: str = "", liar: str = "") -> tuple[Simulation, str]:
    """A job on its way. liar: a verifier that finds everything wrong; the other one comes when it has been asked."""
    simulation = court(seed, faults, cheat=cheat)
    if liar:
        simulation.peers[liar].liar = True
    simulation.run(seconds=3)
    if liar:
        simulation.crash("vera" if liar == "victor" else "victor", for_ns=40 * SECOND)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    return simulation, submit(simulation)


def until_disputed(simulation: Simulation) -> str:
    """Run until a challenge was pressed; by whom."""
    simulation.run(seconds=300, until=lambda: bool(challenger_of(simulation)))
    return challenger_of(simulation)


def until_moved(simulation: Simulation, who: str, number: int) -> None:
    """Run until a player made its move of a round."""
    simulation.run(
        seconds=300, until=lambda: any(w == who and d["number"] == number for w, d in told(simulation, "move"))
    )


def lock_of(simulation: Simulation) -> int:
    """What the first solver locked."""
    return next(iter(node_of(simulation, "alice").settler.channels.values())).agreement.lock_micro


def press(simulation: Simulation, name: str, segment: int, found_root: bytes) -> Case:
    """A challenge by `name` of a segment of the job's first deal, whatever it believes itself."""
    alice = node_of(simulation, "alice")
    deal_id, deal = next(iter(alice.submitter.deals.items()))
    request = request_of(deal, alice.submitter.receipts[deal_id], segment, simulation.network)
    assert request is not None
    case = open_evidence(request, network=simulation.network)
    node_of(simulation, name).disputes.disputant.challenge(case, found_root)
    return case


# --- who is right wins -------------------------------------------------------------------------------------
def test_a_cheat_is_convicted_by_the_referees_own_result() -> None:
    simulation, job = begin(2, cheat=CHEAT)
    state = settle(simulation, job)
    assert (state["state"], state["retried"], state["paid_micro"]) == ("done", 1, 66_000)
    assert state["slashed_micro"] == lock_of(simulation) > 60_000
    assert rulings_of(simulation) == {f"notary{n}": ("wrong", "element", "leaf") for n in range(4)}
    assert simulation.penalties == []
    honest, its_job = begin(3)
    assert settle(honest, its_job)["final_root"] == state["final_root"] == HONEST_ROOT, "as if nobody had cheated"
    assert rulings_of(honest) == {}


def test_a_verifier_that_lies_loses_and_the_honest_solver_is_paid() -> None:
    simulation, job = begin(4, liar="victor")
    state = settle(simulation, job)
    assert (state["state"], state["retried"], state["slashed_micro"]) == ("done", 0, 0)
    assert state["paid_micro"] == 60_000
    assert set(rulings_of(simulation).values()) == {("right", "block", "leaf")}
    assert challenger_of(simulation) == "victor"


@pytest.mark.parametrize("how", ["down", "lying"])
@pytest.mark.parametrize("cheat", [CHEAT, ""])
def test_one_notary_of_four_may_be_down_or_lie(how: str, cheat: str) -> None:
    simulation, job = begin(5, cheat=cheat, liar="" if cheat else "victor")
    if how == "down":
        simulation.crash("notary1", for_ns=0)
    else:
        arbiter = node_of(simulation, "notary1").disputes.arbiter
        rule, see = arbiter._rule, arbiter._see
        opposite = {"wrong": "right", "right": "wrong"}
        arbiter._rule = lambda h, finding, *rest: rule(h, opposite[finding], *rest)  # type: ignore[method-assign]
        arbiter._see = lambda h, side, number, value: see(h, side, number, SILENT)  # type: ignore[method-assign]
    state = settle(simulation, job)
    finding = "wrong" if cheat else "right"
    assert (state["state"], state["retried"]) == ("done", 1 if cheat else 0)
    others = {who: ruling for who, ruling in rulings_of(simulation).items() if who != "notary1"}
    assert set(others.values()) == {(finding, "element" if cheat else "block", "leaf")} and len(others) == 3


@pytest.mark.parametrize("side", ["solver", "challenger"])
def test_a_silent_player_forfeits_when_its_clock_runs_out(side: str) -> None:
    simulation, job = begin(6, cheat=CHEAT if side == "solver" else "", liar="" if side == "solver" else "victor")
    simulation.peers["bob" if side == "solver" else "victor"].silent = True
    state = settle(simulation, job)
    finding = "wrong" if side == "solver" else "right"
    assert set(rulings_of(simulation).values()) == {(finding, "segment", "silence")}
    assert (state["state"], state["retried"]) == ("done", 1 if side == "solver" else 0)


@pytest.mark.parametrize("side", ["solver", "challenger"])
def test_two_signed_moves_for_one_round_convict_by_themselves(side: str) -> None:
    """The mover shows two notaries one move and two another: no notary's game follows either alone."""
    simulation, job = begin(7, cheat=CHEAT if side == "solver" else "", liar="" if side == "solver" else "victor")
    challenger = until_disputed(simulation)
    mover = simulation.peers["bob" if side == "solver" else challenger]
    dispute = next(iter(node_of(simulation, challenger).disputes.disputant.plays))
    until_moved(simulation, mover.name, 1)
    other = Move(network=simulation.network.id, dispute=dispute, player=mover.key.public, number=1, body=b"other")
    for name in ("notary0", "notary1"):
        message = MessageIn(mover.key.public, pack(MoveOffer(seal(other, mover.key))))
        simulation.at(1, simulation.peers[name], message)
    state = settle(simulation, job)
    finding = "wrong" if side == "solver" else "right"
    assert {(f, cause) for f, _, cause in rulings_of(simulation).values()} == {(finding, "equivocation")}
    assert (state["state"], state["slashed_micro"]) == ("done", lock_of(simulation) if side == "solver" else 0)


# --- withheld data -----------------------------------------------------------------------------------------
def base_lost(seed: int) -> tuple[Simulation, str, str]:
    """A cheat is challenged, and then its challenger's disk loses the base of the segment, and nobody else has it."""
    simulation, job = begin(seed, cheat=CHEAT)
    challenger = until_disputed(simulation)
    (play,) = node_of(simulation, challenger).disputes.disputant.plays.values()
    base = play.file.case.base(play.file.challenge.segment)
    assert base and play.file.challenge.segment > 0
    for peer in simulation.peers.values():
        if peer.name != "bob":
            peer.blobs.discard(base)
    simulation.crash(challenger, for_ns=SECOND)
    return simulation, job, challenger


def test_a_base_withheld_from_everybody_convicts_its_solver() -> None:
    simulation, job, _ = base_lost(8)
    simulation.peers["bob"].withholds = set(simulation.peers)
    state = settle(simulation, job)
    assert set(rulings_of(simulation).values()) == {("wrong", "segment", "withheld")}
    assert (state["state"], state["retried"]) == ("done", 1)


def test_a_base_withheld_from_the_challenger_alone_reaches_it_through_the_notaries() -> None:
    simulation, job, challenger = base_lost(9)
    simulation.peers["bob"].withholds = {challenger}
    settle(simulation, job)
    assert set(rulings_of(simulation).values()) == {("wrong", "element", "leaf")}


# --- many challenges ---------------------------------------------------------------------------------------
def test_two_challengers_of_one_root_share_one_game_and_win_together() -> None:
    simulation, job = begin(10, cheat=CHEAT)
    first = until_disputed(simulation)
    (play,) = node_of(simulation, first).disputes.disputant.plays.values()
    challenge = play.file.challenge
    press(simulation, "wendy", challenge.segment, challenge.found_root)
    settle(simulation, job)
    assert states_of(simulation) == ["wrong", "wrong"]
    hearings = node_of(simulation, "notary0").disputes.arbiter.hearings
    played = [msgspec.json.decode(h.file.kept.story or b"{}").get("rounds", 0) for h in hearings.values()]
    assert sorted(map(bool, played)) == [False, True], "one game was played"


def test_a_lost_challenge_does_not_close_the_window_for_an_honest_one() -> None:
    simulation, job = begin(11, cheat=CHEAT)
    alice = node_of(simulation, "alice")
    simulation.run(seconds=60, until=lambda: any(d.drawn for d in alice.submitter.deals.values()))
    (deal,) = alice.submitter.deals.values()
    simulation.peers["wendy"].silent = True
    press(simulation, "wendy", next(s for s in deal.drawn if s), blake("a root nobody reaches"))
    state = settle(simulation, job)
    assert states_of(simulation) == ["right", "wrong"], "the friend of the cheat lost first, then the honest one won"
    assert (state["slashed_micro"], state["paid_micro"]) == (lock_of(simulation), 66_000)


# --- seeds -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_seed_lets_a_cheat_go_or_an_honest_solver_be_slashed(seed: int) -> None:
    cheat = CHEAT if seed % 2 else ""
    faults = Faults.drawn_from(seed)
    simulation, job = begin(seed, faults, cheat=cheat, liar="" if cheat else "victor")
    state = settle(simulation, job)
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"
    assert state["final_root"] == HONEST_ROOT, f"seed {seed}: wrong work was built upon"
    assert bool(state["slashed_micro"]) == ("wrong" in states_of(simulation)), f"seed {seed}"
    # Whatever is lost, doubled, late or killed, what decides is the leaf: nobody forfeits that answers.
    decided = {(finding, cause) for finding, _, cause in rulings_of(simulation).values()}
    assert decided <= {("wrong" if cheat else "right", "leaf")}, f"seed {seed}: {decided}"


@pytest.mark.parametrize("who", ["bob", "challenger", "notary0", "alice"])
@pytest.mark.parametrize("cheat", [CHEAT, ""])
def test_a_restart_in_the_middle_of_a_game_changes_nothing(who: str, cheat: str) -> None:
    simulation, job = begin(12, cheat=cheat, liar="" if cheat else "victor")
    challenger = until_disputed(simulation)
    name = challenger if who == "challenger" else who
    for number in (0, 2):
        until_moved(simulation, challenger if name == "alice" or "notary" in name else name, number)
        simulation.crash(name, for_ns=3 * SECOND)
    state = settle(simulation, job)
    assert (state["state"], state["slashed_micro"] > 0) == ("done", bool(cheat))
    ruled = ("wrong", "element", "leaf") if cheat else ("right", "block", "leaf")
    assert set(rulings_of(simulation).values()) == {ruled}
    assert job_state(simulation, job)["state"] == "done"


# --- who may judge -----------------------------------------------------------------------------------------
def test_a_notary_that_challenged_does_not_judge() -> None:
    simulation, job = begin(13, cheat=CHEAT)
    challenger = until_disputed(simulation)
    (play,) = node_of(simulation, challenger).disputes.disputant.plays.values()
    press(simulation, "notary2", play.file.challenge.segment, play.file.challenge.found_root)
    simulation.peers[challenger].silent = True  # so that the notary's own challenge is the one that is decided
    settle(simulation, job)
    judged = {(who, data["dispute"]) for who, data in told(simulation, "ruling") if data.get("notary")}
    own = next(d["dispute"] for w, d in told(simulation, "dispute") if w == "notary2" and d.get("part") == "challenger")
    me = simulation.peers["notary2"].key.public
    assert (("notary0", own) in judged) and not any(
        data["notary"] == me for _, data in told(simulation, "ruling") if data["dispute"] == own
    )


# --- whistleblowers ----------------------------------------------------------------------------------------
def agreement(**fields: Any) -> Agreement:
    known: dict[str, Any] = {name: bytes(32) for name in Agreement.__struct_fields__}
    numbers = {
        "unit_price": 1000, "first_segment": 0, "last_segment": 6, "operations": 60 * 10**9, "lock_micro": 300_000,
        "sequence": 1, "channel_micro": 110_000, "check_permille": 200, "accept_before_ns": 1, "segment_deadline_ns": 1,
        "created_ns": 1, "forced_commitment": b"c" * 32,
    }  # fmt: skip
    return Agreement(**{**known, **numbers, **fields})


def prospect(about: Agreement | None = None, **fields: Any) -> Prospect:
    known: dict[str, Any] = {
        "own_price": 1000, "right": 0, "wrong": 0, "others": 0, "pool_micro": 0,
        "rules": Rules(forced_ppm=2000, jackpot_permille=1200),
    }  # fmt: skip
    return prospect_of(about or agreement(), **{**known, **fields})


def test_whistleblowers_enter_for_what_they_can_expect_and_leave_when_it_is_less() -> None:
    assert prospect() == Prospect(cost_micro=10_000, expected_micro=7_500), "a newcomer, alone: not yet worth it"
    assert prospect(own_price=700).pays, "cheaper machines enter first"
    assert prospect(wrong=1).pays, "a solver that was found wrong before"
    assert not prospect(wrong=1, others=1).pays, "but not for two"
    assert not prospect(own_price=700, right=10).pays, "nor of a solver with a record"
    # The price is 60,000: a jackpot of 36 M, found with 0.2 % in one of six segments, is worth 12,000.
    assert prospect(pool_micro=10**9).expected_micro == 7_500 + 12_000
    assert prospect(pool_micro=6 * 10**6).expected_micro == 7_500 + 2_000, "no more than the pool holds"
    assert prospect(pool_micro=10**9, rules=Rules(forced_ppm=0)).expected_micro == 7_500
    tolerant = agreement(tolerance=b"t" * 32)
    assert prospect(tolerant, pool_micro=10**9).expected_micro == 7_500, "no error is ordered in tolerant work"
    unit = agreement(forced_commitment=NO_ERRORS)
    assert prospect(unit, pool_micro=10**9).expected_micro == 7_500, "nor in a unit of a parallel job"


def test_a_whistleblower_finds_what_lying_verifiers_covered() -> None:
    every = msgspec.structs.replace(COURT_RULES, check_segments_min=6)  # so its verdict is on what wendy draws
    simulation = court(31, cheat=CHEAT, wendys_price=300, rules=every)
    for name in ("victor", "vera"):
        simulation.peers[name].liar = True  # they get wrong what the cheat gets wrong, and call it right
        simulation.peers[name].lie = CHEAT
    simulation.run(seconds=3)
    job = submit(simulation)
    settle(simulation, job)
    assert challenger_of(simulation) == "wendy"
    assert [data["finding"] for _, data in told(simulation, "verdict")] == ["right"]
    assert set(rulings_of(simulation).values()) == {("wrong", "element", "leaf")}
    alice, keys = node_of(simulation, "alice"), {name: peer.key.public for name, peer in simulation.peers.items()}
    (verdict,) = told(simulation, "verdict")
    liar = verdict[1]["checker"]
    assert alice.settler.free_stake(keys["bob"]) == 50_000_000 - lock_of(simulation), "the lock was still there"
    assert alice.settler.free_stake(liar) == 50_000_000 - 180_000, "and half of that of its verifier"
    assert alice.settler.free_micro(keys["wendy"]) > 3_000, "the find paid for the re-check"


def test_a_verdict_that_comes_before_its_agreement_is_weighed_when_that_is_here() -> None:
    simulation, job = begin(32)
    settle(simulation, job)
    node = node_of(simulation, "wendy")
    (deal_id,) = node.settler.channels
    (verdict, *_) = (data["checker"] for _, data in told(simulation, "verdict"))
    late = Verdict(
        network=simulation.network.id, agreement=deal_id, proof=bytes(32), checker=verdict, role="verifier",
        segments=(0,), finding="right", wrong_segment=0, claimed_root=bytes(32), found_root=bytes(32), operations=1,
        done_ns=1,
    )  # fmt: skip
    whistleblower = Whistleblower(node.desk, node.settler, node.checker)
    channel = node.settler.channels.pop(deal_id)
    whistleblower.on_verdict(late)
    whistleblower.tick()
    assert not whistleblower.weighed
    node.settler.channels[deal_id] = channel
    whistleblower.tick()
    assert deal_id in whistleblower.weighed


# --- hostile bytes -----------------------------------------------------------------------------------------
def test_hostile_bytes_change_nothing_at_a_notary() -> None:
    simulation, job = begin(15, cheat=CHEAT)
    challenger = until_disputed(simulation)
    until_moved(simulation, challenger, 1)
    notary = node_of(simulation, "notary0")
    (dispute,) = notary.disputes.arbiter.hearings
    file = notary.disputes.arbiter.hearings[dispute].file
    eve, network = SigningKey.from_seed(b"e" * 32), simulation.network.id
    move = Move(network=network, dispute=dispute, player=eve.public, number=0, body=b"")
    stranger = seal(move, eve)
    ahead = seal(msgspec.structs.replace(move, number=10**6), eve)
    ruling = Ruling(
        network=network, notary=eve.public, dispute=dispute, agreement=file.challenge.agreement,
        segment=file.challenge.segment, finding="right", level="step", cause="leaf", operations=0, transcript=bytes(32),
    )  # fmt: skip
    forged = msgspec.structs.replace(file.challenge, challenger=eve.public)
    wendy = simulation.peers["wendy"].key  # has a stake, so that what she gives is looked at
    staked = msgspec.structs.replace(forged, challenger=wendy.public)
    at = m.GameAt(dispute, 1, b"\1" * 32, b"\1" * 32, closed=True, opening=False, answer=False)
    alice = simulation.peers["alice"].key.public
    messages: list[tuple[bytes, m.Message, str]] = [
        (eve.public, m.MoveOffer(stranger), "verification-failed"),
        (eve.public, m.MoveOffer(ahead), "verification-failed"),
        (eve.public, m.MoveOffer(file.kept.challenge), "verification-failed"),
        (eve.public, m.OpeningOffer(dispute, 0, 1, b"operands"), "verification-failed"),
        (alice, m.OpeningOffer(dispute, 0, 1, b"operands"), "verification-failed"),
        (eve.public, m.Records((seal(ruling, eve),)), "verification-failed"),
        (eve.public, m.DisputeOpen(file.kept.challenge[:-1], file.case.request), "malformed"),
        (eve.public, m.DisputeOpen(seal(ruling, eve), file.case.request), "verification-failed"),
        (
            eve.public,
            m.DisputeOpen(
                seal(msgspec.structs.replace(staked, segment=99), wendy),
                file.case.request,
            ),
            "verification-failed",
        ),
        (
            eve.public,
            m.DisputeOpen(
                seal(msgspec.structs.replace(staked, claimed_root=bytes(32)), wendy),
                file.case.request,
            ),
            "verification-failed",
        ),
    ]
    for peer, message, code in messages:
        effects = notary.handle(MessageIn(peer, pack(message)), simulation.now_ns)
        assert [e.data["code"] for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"] == [code], message
        assert not [e for e in effects if isinstance(e, Save | Post)], message
        assert [e for e in effects if isinstance(e, Penalise)], message
    for peer in (eve.public, alice):  # not even counted: they are no notaries
        before = {place: dict(said) for place, said in notary.disputes.arbiter.hearings[dispute].said.items()}
        notary.handle(MessageIn(peer, pack(at)), simulation.now_ns)
        assert notary.disputes.arbiter.hearings[dispute].said == before
    effects = notary.handle(
        MessageIn(eve.public, pack(m.DisputeOpen(seal(forged, eve), file.case.request))), simulation.now_ns
    )
    (declined,) = [m.unpack(e.data) for e in effects if isinstance(e, Send) and e.peer == eve.public] or [None]
    assert declined is None, "a peer that is not connected is told nothing, and a challenge without stake opens nothing"
    assert list(notary.disputes.arbiter.hearings) == [dispute]
    assert settle(simulation, job)["retried"] == 1


def test_replayed_messages_of_a_whole_dispute_change_nothing() -> None:
    simulation, job = begin(17, cheat=CHEAT)
    heard: list[tuple[str, MessageIn]] = []
    deliver = simulation._deliver

    def tap(target: Any, event: Any) -> None:
        if isinstance(event, MessageIn):
            heard.append((target.name, event))
        deliver(target, event)

    simulation._deliver = tap  # type: ignore[method-assign]
    settle(simulation, job)
    before = {name: dict(node_of(simulation, name).desk.ledger.balances()) for name in simulation.peers}
    rows = {name: dict(peer.rows.get("disputes", {})) for name, peer in simulation.peers.items()}
    assert sum(isinstance(m.unpack(event.data), m.DisputeMessage) for _, event in heard) > 100
    for name, event in heard:
        effects = node_of(simulation, name).handle(event, simulation.now_ns)
        assert not [e for e in effects if isinstance(e, Post)]
        simulation._commit(simulation.peers[name], effects)
    assert {name: dict(peer.rows.get("disputes", {})) for name, peer in simulation.peers.items()} == rows
    simulation.run(seconds=30)
    simulation.check_quiet()
    assert {name: dict(node_of(simulation, name).desk.ledger.balances()) for name in simulation.peers} == before


# --- figures -----------------------------------------------------------------------------------------------
def test_a_dispute_costs_few_messages_and_bytes() -> None:
    """The simulator's Program is tiny, so a game has few rounds; each costs the same in every game."""
    simulation, job = begin(16, cheat=CHEAT)
    sent: list[tuple[str, int]] = []
    deliver = simulation._deliver

    def tap(target: Any, event: Any) -> None:
        if isinstance(event, MessageIn):
            message = m.unpack(event.data)
            if isinstance(message, m.DisputeMessage):
                sent.append((type(message).__name__, len(event.data)))
        deliver(target, event)

    simulation._deliver = tap  # type: ignore[method-assign]
    settle(simulation, job)
    (hearing,) = node_of(simulation, "notary0").disputes.arbiter.hearings.values()
    told_story = msgspec.json.decode(hearing.file.kept.story)
    assert told_story["message_bytes"] < 50_000
    assert told_story["opening_bytes"] < 200 * 1024
    by_kind = {kind: [size for k, size in sent if k == kind] for kind in sorted({k for k, _ in sent})}
    # Each round: two moves to four notaries, two copies of each to the other side and to the submitter that looks on.
    assert len(by_kind["MoveOffer"]) <= 20 * told_story["rounds"]
    assert sum(len(sizes) for sizes in by_kind.values()) < 100 * told_story["rounds"]
