"""Bad bytes at the node's door: each is refused with its reason, costs its sender, and changes nothing else."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer import messages as m
from peer.events import (
    Effect,
    Emit,
    Fetched,
    GossipIn,
    MessageIn,
    Penalise,
    Post,
    Save,
    SegmentMade,
    Send,
    StepMade,
    Tick,
    WorkEnded,
)
from peer.messages import pack, unpack
from peer.simulator import SECOND, START_NS, Faults, Simulation
from protocol import params
from protocol.codec import blake, encode
from protocol.keys import SigningKey
from protocol.records import (
    Agreement,
    Ask,
    Claim,
    Envelope,
    Proof,
    Reveal,
    Settlement,
    Slash,
    Verdict,
    Voucher,
    add_signature,
    decode_body,
    open_record,
    seal,
)
from protocol.sampling import randomness, select_segments
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(until_ns=0)
EVE = SigningKey.from_seed(b"e" * 32)


@pytest.fixture(scope="module")
def running() -> Simulation:
    """A swarm with a deal half done."""
    simulation = make_swarm(21, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 2)
    return simulation


def give(simulation: Simulation, name: str, event: GossipIn | MessageIn) -> list[Effect]:
    node = simulation.peers[name].node
    assert node is not None
    return node.handle(event, simulation.now_ns)


def refusals(effects: list[Effect]) -> list[str]:
    return [str(e.data["code"]) for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"]


NUMBERS = itertools.count(1)


def ask(simulation: Simulation, **changes: object) -> bytes:
    now = simulation.now_ns
    fields: dict[str, object] = {
        "network": simulation.network.id,
        "peer": EVE.public,
        "slot": 0,
        "sequence": next(NUMBERS),  # two of one number would convict Eve instead
        "roles": 1,
        "unit_price": 1,
        "memory_bytes": 1,
        "sandbox": 1,
        "operations_per_second": 1,
        "created_ns": now,
        "expires_ns": now + 10 * SECOND,
    }
    return seal(Ask(**{**fields, **changes}), EVE)  # type: ignore[arg-type]


def gossip(*envelopes: bytes) -> GossipIn:
    return GossipIn("market", EVE.public, encode(list(envelopes)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=300), direct=st.booleans())
def test_random_bytes_cost_their_sender_and_change_nothing(running: Simulation, data: bytes, direct: bool) -> None:
    event = MessageIn(EVE.public, data) if direct else GossipIn("market", EVE.public, data)
    effects = give(running, "alice", event)
    assert not [e for e in effects if isinstance(e, Save | Post)]
    if data != b"\x90":  # an empty bundle is a bundle
        assert [e for e in effects if isinstance(e, Penalise)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"network": bytes(32)}, "wrong-network"),
        ({"peer": bytes(32)}, "verification-failed"),
        ({"created_ns": START_NS + 10**15, "expires_ns": START_NS + 10**15 + SECOND}, "verification-failed"),
        ({"expires_ns": START_NS + params.RECORD_LIFETIME_NS_MAX + 10**15}, "malformed"),
        ({"roles": 99}, "malformed"),
    ],
)
def test_a_bad_record_is_refused_by_name(running: Simulation, change: dict[str, object], code: str) -> None:
    effects = give(running, "bob", gossip(ask(running, **change)))
    assert refusals(effects) == [code]


def test_an_oversize_message_is_refused(running: Simulation) -> None:
    effects = give(running, "bob", MessageIn(EVE.public, bytes(params.MESSAGE_BYTES_MAX + 1)))
    assert refusals(effects) == ["limit-exceeded"]


def test_a_truncated_bundle_is_refused(running: Simulation) -> None:
    whole = gossip(ask(running, sequence=77)).data
    for cut in range(1, len(whole), 7):
        assert refusals(give(running, "carol", GossipIn("market", EVE.public, whole[:cut]))) == ["malformed"]


def test_a_replayed_record_is_neither_news_nor_a_crime(running: Simulation) -> None:
    standing = running.peers["bob"].node
    assert standing is not None
    effects = give(running, "carol", gossip(standing.bidder.ask, standing.bidder.ask))
    assert not [e for e in effects if isinstance(e, Penalise | Save)]


def test_replayed_messages_of_a_whole_job_change_nothing() -> None:
    simulation = make_swarm(22, CALM)
    heard: list[tuple[str, bytes, bytes]] = []
    original = simulation._deliver

    def tap(target, event):  # type: ignore[no-untyped-def]
        if isinstance(event, MessageIn):
            heard.append((target.name, event.peer, event.data))
        original(target, event)

    simulation._deliver = tap  # type: ignore[method-assign]
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=120, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=60)
    simulation.check_quiet()
    before = {n: dict(p.node.desk.ledger.balances()) for n, p in simulation.peers.items() if p.node}
    for name, peer, data in heard:
        effects = give(simulation, name, MessageIn(peer, data))
        assert not [e for e in effects if isinstance(e, Post)]
    simulation.run(seconds=60)
    after = {n: dict(p.node.desk.ledger.balances()) for n, p in simulation.peers.items() if p.node}
    assert before == after
    simulation.check_quiet()


def the_deal(simulation: Simulation) -> bytes:
    node = simulation.peers["alice"].node
    assert node is not None
    return next(iter(node.submitter.deals))


def wrong_verdict(simulation: Simulation, key: SigningKey, *, proof: bytes, segment: int) -> bytes:
    return seal(
        Verdict(
            network=simulation.network.id,
            agreement=the_deal(simulation),
            proof=proof,
            checker=key.public,
            role="verifier",
            segments=(segment,),
            finding="wrong",
            wrong_segment=segment,
            claimed_root=bytes(32),
            found_root=blake("x"),
            operations=1,
            done_ns=1,
        ),
        key,
    )


def slash_by(
    simulation: Simulation, *judges: SigningKey, drawn: bool = True, author: SigningKey | None = None
) -> bytes:
    """A slash of the running deal over a proof and a draw that are real unless told otherwise."""
    network, deal = simulation.network.id, the_deal(simulation)
    alice = simulation.peers["alice"]
    assert alice.node is not None
    prover = author or alice.key
    proof = seal(
        Proof(
            network=network,
            agreement=deal,
            author=prover.public,
            receipts=6,
            root=bytes(32),
            last_receipt=bytes(32),
            program=bytes(32),
        ),
        prover,
    )
    proof_id = open_record(proof, network=network)[1]
    seed = alice.node.submitter.deals[deal].seed
    reveal = Reveal(network=network, agreement=deal, proof=proof_id, author=alice.key.public, seed=seed)
    random = randomness(proof=proof_id, submitter_seed=seed, solver_seed=b"")
    chosen = select_segments(random, first=0, last=6, permille=200, minimum=2)
    segment = chosen[0] if drawn else next(s for s in range(6) if s not in chosen)
    verdicts = tuple(wrong_verdict(simulation, key, proof=proof_id, segment=segment) for key in judges)
    reveals = (seal(reveal, alice.key),)
    slash = Slash(network=network, agreement=deal, author=EVE.public, proof=proof, reveals=reveals, verdicts=verdicts)
    return seal(slash, EVE)


def forged(simulation: Simulation) -> dict[str, bytes]:
    """Records a thief would like to see accepted on the running deal."""
    network, deal = simulation.network.id, the_deal(simulation)
    alice, bob, victor, wendy = (simulation.peers[name].key for name in ("alice", "bob", "victor", "wendy"))
    stranger = SigningKey.from_seed(b"f" * 32)
    settlement = {"network": network, "agreement": deal, "proof": bytes(32), "solver": bob.public}
    voucher = Voucher(
        network=network,
        agreement=deal,
        epoch=0,
        sequence=9,
        cumulative_micro=10**6,
        cumulative_operations=1,
        receipt=bytes(32),
        submitter=EVE.public,
    )
    claim = {"network": network, "agreement": deal, "fees": ()}
    greedy = Claim(**{**claim, "author": bob.public, "voucher": b"", "fees": ((bob.public, 5),)})  # type: ignore[arg-type]
    theirs = Settlement(**settlement, submitter=EVE.public, paid_micro=10**6, fees=((EVE.public, 10**6),))  # type: ignore[arg-type]
    half = Settlement(**settlement, submitter=alice.public, paid_micro=1, fees=())  # type: ignore[arg-type]
    return {
        "settlement of strangers": add_signature(seal(theirs, EVE), bob, network=network),
        "settlement with one signature": seal(half, bob),
        "claim by a stranger": seal(Claim(**claim, author=EVE.public, voucher=b""), EVE),  # type: ignore[arg-type]
        "claim with a voucher the thief signed": seal(
            Claim(**claim, author=bob.public, voucher=seal(voucher, EVE)),  # type: ignore[arg-type]
            bob,
        ),
        "claim in which a solver pays fees": seal(greedy, bob),
        "slash by checkers without a stake": slash_by(simulation, EVE, stranger),
        "slash by one checker twice": slash_by(simulation, victor, victor),
        "slash by one checker alone": slash_by(simulation, victor),
        "slash on a segment that was not drawn": slash_by(simulation, victor, wendy, drawn=False),
        "slash on a stranger's proof": slash_by(simulation, victor, wendy, author=EVE),
        "slash judged by the submitter": slash_by(simulation, victor, alice),
    }


@pytest.mark.parametrize(
    "what",
    [
        "settlement of strangers",
        "settlement with one signature",
        "claim by a stranger",
        "claim with a voucher the thief signed",
        "claim in which a solver pays fees",
        "slash by checkers without a stake",
        "slash by one checker twice",
        "slash by one checker alone",
        "slash on a segment that was not drawn",
        "slash on a stranger's proof",
        "slash judged by the submitter",
    ],
)
def test_no_forged_record_moves_money(running: Simulation, what: str) -> None:
    node = running.peers["carol"].node
    assert node is not None
    before = dict(node.desk.ledger.balances())
    effects = give(running, "carol", GossipIn("settlement", EVE.public, encode([forged(running)[what]])))
    assert refusals(effects) == ["verification-failed"]
    assert dict(node.desk.ledger.balances()) == before


def test_a_slash_with_a_real_draw_and_a_quorum_convicts_so_the_refusals_above_mean_something() -> None:
    simulation = make_swarm(23, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 2)
    victor, wendy = simulation.peers["victor"].key, simulation.peers["wendy"].key
    slash = slash_by(simulation, victor, wendy)
    effects = give(simulation, "carol", GossipIn("settlement", EVE.public, encode([slash])))
    assert refusals(effects) == []
    node = simulation.peers["carol"].node
    assert node is not None
    assert node.settler.channels[the_deal(simulation)].closed == "slashed"


def test_a_voucher_beyond_the_channel_is_refused_before_it_can_be_claimed(running: Simulation) -> None:
    alice, bob = running.peers["alice"], running.peers["bob"]
    assert alice.node is not None and bob.node is not None
    deal_id = the_deal(running)
    deal = bob.node.solver.deals[deal_id]
    both = alice.node.submitter.receipts[deal_id][-1]
    voucher = Voucher(
        network=running.network.id,
        agreement=deal_id,
        epoch=0,
        sequence=9,
        cumulative_micro=10**9,
        cumulative_operations=1,
        receipt=bytes(32),
        submitter=alice.key.public,
    )
    sequence = len(alice.node.submitter.receipts[deal_id]) - 1
    before, deal.receipts = deal.receipts, sequence  # as if this ReceiptBack were the next
    effects = give(running, "bob", MessageIn(alice.key.public, pack(m.ReceiptBack(both, seal(voucher, alice.key)))))
    deal.receipts = before
    assert refusals(effects) == ["verification-failed"]


def test_a_huge_loss_is_no_reason_to_fall_over(running: Simulation) -> None:
    node = running.peers["bob"].node
    assert node is not None
    assert node.handle(StepMade(the_deal(running), 1, 1e30), running.now_ns)


def test_an_opening_that_costs_nothing_is_no_opening(running: Simulation) -> None:
    other = SigningKey.from_seed(b"g" * 32)
    fields = {f.name: bytes(32) for f in msgspec.structs.fields(Agreement)}
    numbers = ("first_segment", "operations", "unit_price", "channel_micro", "lock_micro", "sequence")
    times = {"accept_before_ns": 1, "segment_deadline_ns": 1, "created_ns": 1, "check_permille": 200, "last_segment": 1}
    free = Agreement(
        **{**fields, **dict.fromkeys(numbers, 0), **times},  # type: ignore[arg-type]
    )
    free = msgspec.structs.replace(free, network=running.network.id, submitter=EVE.public, solver=other.public)
    whole = add_signature(seal(free, EVE), other, network=running.network.id)
    assert refusals(give(running, "carol", GossipIn("settlement", EVE.public, encode([whole])))) == [
        "verification-failed"
    ]


def test_an_agreement_cannot_be_opened_twice_under_one_number(running: Simulation) -> None:
    alice, bob = running.peers["alice"], running.peers["bob"]
    assert alice.node is not None
    envelope = alice.node.submitter.deals[the_deal(running)].agreement
    agreement = decode_body(msgspec.msgpack.decode(envelope, type=Envelope).body, network=running.network.id)
    second = msgspec.structs.replace(agreement, created_ns=1)
    twice = add_signature(seal(second, alice.key), bob.key, network=running.network.id)
    assert open_record(twice, network=running.network.id)[1] != the_deal(running)
    assert refusals(give(running, "carol", GossipIn("settlement", EVE.public, encode([twice])))) == [
        "verification-failed"
    ]


@pytest.mark.parametrize(
    "message",
    [
        m.Opened(b"\x00"),
        m.ReceiptOffer(b"\x92\xc4\x00\x90"),
        m.ReceiptBack(b"", b""),
        m.ProofOffer(b"x"),
        m.RevealOffer(b""),
        m.SettleOffer(b""),
        m.SettleBack(b""),
        m.Accept(b"zz"),
        m.Propose(b"", b"", b""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_with_a_broken_record_inside_is_refused(running: Simulation, message: m.Message) -> None:
    for name in ("alice", "bob", "victor"):
        effects = give(running, name, MessageIn(EVE.public, pack(message)))
        assert refusals(effects), name
        assert not [e for e in effects if isinstance(e, Save | Post)]


def test_events_of_forgotten_work_are_ignored(running: Simulation) -> None:
    for name in ("alice", "bob", "victor"):
        node = running.peers[name].node
        assert node is not None
        stale = blake("stale")
        for event in (
            Fetched(stale, stale),
            WorkEnded(stale, "killed"),
            SegmentMade(stale, 0, stale, stale, (), 1, stale, 1),
        ):
            assert not [e for e in node.handle(event, running.now_ns) if isinstance(e, Save | Post)]


def test_who_lacks_the_log_gets_it_in_the_order_in_which_it_came(running: Simulation) -> None:
    node = running.peers["alice"].node
    assert node is not None
    log = node.settler.log
    node.settler.log = dict(sorted(log.items(), reverse=True))  # of one record there is but one order
    node.settler.log |= {blake("later", bytes([n])): bytes([n]) for n in range(100)}
    effects = give(running, "alice", MessageIn(running.peers["bob"].key.public, pack(m.SyncIds((), answer=False))))
    sent = [message for e in effects if isinstance(e, Send) and isinstance(message := unpack(e.data), m.Records)]
    assert [envelope for message in sent for envelope in message.records] == list(node.settler.log.values())
    node.settler.log = log


def test_a_clock_that_jumps_back_does_not_move_the_node_back(running: Simulation) -> None:
    node = running.peers["carol"].node
    assert node is not None
    before = node.desk.now_ns
    node.handle(Tick(), before - 600 * SECOND)
    assert node.desk.now_ns == before


def test_a_peer_whose_clock_is_ten_minutes_ahead_is_told_so(running: Simulation) -> None:
    ahead = running.now_ns + 600 * SECOND
    effects = give(running, "carol", gossip(ask(running, sequence=5, created_ns=ahead, expires_ns=ahead + SECOND)))
    why = [str(e.data["why"]) for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"]
    assert "clock" in why[0]
    assert "timedatectl" in why[0]
