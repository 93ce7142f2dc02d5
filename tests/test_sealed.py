"""Sealed jobs: what leaves a peer opens for the winner and the drawn checkers, and says nothing to anybody else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import pytest

from peer import messages as m
from peer.deals import Deal, salt_of, task_of
from peer.events import GossipIn, Input, MessageIn
from peer.simulated_work import CONTENTS, PROGRAM, TOKENS, initial_root
from peer.simulator import Faults, SimulatedPeer, Simulation
from protocol.bundle import make_bundle, verify_bundle
from protocol.codec import encode
from protocol.errors import RemoteProtocolError
from protocol.keys import SigningKey
from protocol.network import dump
from protocol.program import program_id
from protocol.records import Agreement, Offer, Verdict, open_record
from protocol.sealing import Contents, Keys, locator_of, read_keys
from tests.bundle_forge import plain
from tests.dispute_swarm import court, settle, states_of
from tests.swarm_scenario import job_state, make_swarm, make_task, over, rest, submit

CALM = Faults(until_ns=0)
NAME = "a-name-nobody-should-read"
(TASK_DATA,) = set(CONTENTS) - {program_id(PROGRAM.to_bytes())}


class Tapped:
    """Everything that every peer of a swarm sent, with its sender and receiver, as the swarm delivers it."""

    def __init__(self, swarm: Simulation) -> None:
        self.swarm, self.sent = swarm, list[tuple[bytes, str, Input]]()
        deliver = swarm._deliver

        def tap(target: SimulatedPeer, event: Input) -> None:
            assert isinstance(event, MessageIn | GossipIn)
            sender = event.peer if isinstance(event, MessageIn) else event.author
            self.sent.append((sender, target.name, event))
            deliver(target, event)

        swarm._deliver = tap  # type: ignore[method-assign]

    def bytes_to(self, *names: str) -> list[bytes]:
        """What some peers were sent."""
        return [e.data for _, name, e in self.sent if name in names and isinstance(e, MessageIn | GossipIn)]

    def messages(self) -> Iterator[tuple[str, m.Message]]:
        """The direct messages, with their receivers."""
        for _, name, event in self.sent:
            if isinstance(event, MessageIn):
                yield name, m.unpack(event.data)


def submit_sealed(swarm: Simulation, **changed: object) -> str:
    """Alice submits a sealed job."""
    task = msgspec.structs.replace(make_task(swarm.network), name=NAME, **changed)
    alice = swarm.peers["alice"]
    alice.blobs |= set(CONTENTS)
    reply = swarm.command(
        "alice",
        "submit",
        {
            "task": encode(task).hex(), "budget_micro": 10_000_000, "unit_price_max": 2000, "sealed": True,
            "base_root": initial_root(task.seed).hex(), "checkpoint_bytes": 10_000, "memory_bytes": 2**20,
        },
    )  # fmt: skip
    assert reply.error is None, reply.error
    return str(reply.result["job"])


def run(swarm: Simulation, job: str) -> dict[str, object]:
    swarm.run(seconds=900, until=over(swarm, job))
    state = job_state(swarm, job)
    rest(swarm, seconds=240)
    swarm.check_quiet()
    return state


def whole(seed: int, *, cheat: str = "", faults: Faults = CALM) -> tuple[Simulation, Tapped, str]:
    swarm = make_swarm(seed, faults, cheat=cheat)
    tapped = Tapped(swarm)
    swarm.run(seconds=3)
    while swarm.peers["alice"].node is None:
        swarm.run(seconds=3)
    return swarm, tapped, submit_sealed(swarm)


def deal_of(swarm: Simulation) -> Deal:
    node = swarm.peers["alice"].node
    assert node is not None
    return next(iter(node.submitter.deals.values()))


def secrets_of(swarm: Simulation) -> dict[str, bytes]:
    """Every byte string that would give the job away, or let a guess of it be confirmed."""
    node = swarm.peers["alice"].node
    assert node is not None
    (job,) = node.jobs.jobs.values()
    task = task_of(job.task)
    ends = [open_record(r, network=swarm.network.id)[0] for rs in node.submitter.receipts.values() for r in rs]
    states = {f"{field} of segment {r.segment}": getattr(r, field) for r in ends for field in ("in_root", "checkpoint")}  # type: ignore[union-attr]
    return {
        "key": job.key, "salt": salt_of(task), "name": NAME.encode(), "task": job.task, "program": PROGRAM.to_bytes(),
        "program id": program_id(PROGRAM.to_bytes()), "data": TOKENS[:64], "base root": job.base_root,
        "data id": TASK_DATA, **states,
    }  # fmt: skip


def test_a_sealed_job_is_worked_checked_and_paid_as_an_open_one() -> None:
    swarm, _, job = whole(1)
    state = run(swarm, job)
    assert (state["state"], state["slashed_micro"], state["retried"], state["paid_micro"]) == ("done", 0, 0, 60_000)
    opened = make_swarm(1, CALM)
    opened.run(seconds=3)
    assert run(opened, submit(opened))["final_root"] == state["final_root"], "salt and key change no number"
    evidence = plain(swarm.command("alice", "bundle", {"job": job}).result)
    report = verify_bundle(make_bundle(evidence, network=dump(swarm.network), state={}), swarm.network.id)
    assert report.final_root.hex() == state["final_root"]
    held = {(k["role"], k["opens"]) for k in state["keys"]}  # type: ignore[attr-defined]
    assert state["privacy"] == "sealed" and ("solver", "all") in held and ("verifier", "all") in held


def test_what_strangers_were_sent_names_nothing_of_the_job() -> None:
    swarm, tapped, job = whole(2)
    run(swarm, job)
    secrets = secrets_of(swarm)
    assert len(secrets) > 12
    for what, secret in secrets.items():
        for data in tapped.bytes_to("carol"):  # who bids, hears everything, and wins nothing
            assert secret not in data, f"carol was sent the {what}"
        for _, _, event in tapped.sent:
            if isinstance(event, GossipIn):
                assert secret not in event.data, f"the {what} is in gossip"


def test_the_offer_of_a_known_program_looks_like_that_of_any_other() -> None:
    swarm, _, _ = whole(3)
    swarm.run(seconds=1)
    node = swarm.peers["alice"].node
    assert node is not None
    (job,) = node.jobs.jobs.values()
    offer = open_record(job.offer, network=swarm.network.id)[0]
    assert isinstance(offer, Offer)
    twin = make_swarm(4, CALM)
    twin.run(seconds=3)
    submit_sealed(twin)
    other_node = twin.peers["alice"].node
    assert other_node is not None
    other = open_record(next(iter(other_node.jobs.jobs.values())).offer, network=twin.network.id)[0]
    assert isinstance(other, Offer)
    assert offer.privacy == other.privacy == "sealed"
    assert {offer.task, offer.program, offer.data}.isdisjoint({other.task, other.program, other.data})
    assert (offer.operations, offer.memory_bytes) == (other.operations, other.memory_bytes), "terms stay terms"


@pytest.mark.parametrize("cheat", ["", "skip-step"])
def test_every_other_key_and_the_whole_transcript_open_nothing(cheat: str) -> None:
    swarm, tapped, job = whole(5, cheat=cheat)
    run(swarm, job)
    told = {name for name, message in tapped.messages() if getattr(message, "box", b"")}
    state = job_state(swarm, job)
    solvers = {d["solver"] for d in state["deals"]}  # type: ignore[attr-defined]
    assert len(solvers) == (2 if cheat else 1)
    boxes = [
        (name, message.box)
        for name, message in tapped.messages()
        if isinstance(message, m.Opened | m.CheckRequest) and message.box
    ]
    assert boxes and {name for name, _ in boxes} == told
    keys = {name: peer.key for name, peer in swarm.peers.items()}
    keys["stranger"] = SigningKey.from_seed(b"s" * 32)
    for (receiver, box), (name, key) in itertools.product(boxes, keys.items()):
        if name == receiver:
            assert key.open_box(box)
        else:
            with pytest.raises(RemoteProtocolError):
                key.open_box(box)
    for name in ("carol",) if not cheat else ():
        assert name not in told, f"{name} was given a key"
    # With its own, non-sealed, traffic removed, what is left to anybody else holds neither the key nor the task.
    secrets = secrets_of(swarm)
    for name in set(swarm.peers) - told - {"alice"}:
        for data in tapped.bytes_to(name):
            assert not any(secret in data for secret in secrets.values())


def test_nobody_serves_a_blob_of_the_job_as_it_is_or_under_another_key() -> None:
    swarm, _, job = whole(6)
    run(swarm, job)
    node = swarm.peers["alice"].node
    assert node is not None
    (held,) = node.jobs.jobs.values()
    envelopes = [e for receipts in node.submitter.receipts.values() for e in receipts]
    names = [open_record(e, network=swarm.network.id)[0].checkpoint for e in envelopes]  # type: ignore[union-attr]
    right, wrong = Keys(held.key), Keys(bytes(32))
    served = 0
    for peer in swarm.peers.values():
        for blob in {*CONTENTS, *names} & peer.blobs:
            served += 1
            assert not peer.gives(blob, None) and not peer.gives(blob, wrong), f"{peer.name} serves {blob.hex()[:8]}"
            assert peer.gives(blob, right)
    assert served > 10, "alice, the solver and the checkers all hold some"


def test_a_solver_that_died_after_the_award_goes_on_with_its_key() -> None:
    swarm, _, job = whole(7)
    swarm.run(seconds=60, until=lambda: job_state(swarm, job).get("segments_done") == 2)
    swarm.crash("bob", for_ns=2 * 10**9)
    swarm.run(seconds=3)
    swarm.crash("alice", for_ns=2 * 10**9)
    swarm.run(seconds=5)
    state = run(swarm, job)
    assert (state["state"], state["slashed_micro"]) == ("done", 0)


def test_after_a_solver_is_lost_a_second_one_gets_the_key_and_the_first_keeps_what_it_saw() -> None:
    swarm, tapped, job = whole(8)
    swarm.run(seconds=60, until=lambda: job_state(swarm, job).get("segments_done") == 3)
    swarm.crash("bob", for_ns=0)
    state = run(swarm, job)
    assert (state["state"], state["retried"]) == ("done", 1)
    assert [deal["paid_micro"] for deal in state["deals"]] == [30_000, 33_000]  # type: ignore[attr-defined]
    opened = {name for name, message in tapped.messages() if isinstance(message, m.Opened) and message.box}
    assert opened == {"bob", "carol"}


def test_the_contents_come_after_both_signatures_only() -> None:
    swarm, tapped, job = whole(9)
    run(swarm, job)
    for name, message in tapped.messages():
        if isinstance(message, m.Propose):
            assert not message.task and not message.base_blob and name == "bob"
        if isinstance(message, m.Opened):
            record, agreement_id, signers = open_record(message.agreement, network=swarm.network.id)
            assert isinstance(record, Agreement) and signers == {record.submitter, record.solver}
            given = msgspec.msgpack.decode(swarm.peers[name].key.open_box(message.box), type=Contents)
            assert given.agreement == agreement_id
        if isinstance(message, m.CheckRequest):
            assert read_keys(swarm.peers[name].key.open_box(message.box)).job


def test_a_whistleblower_that_nobody_drew_is_given_no_case() -> None:
    swarm, tapped, job = whole(10)
    run(swarm, job)
    node, deal = swarm.peers["alice"].node, deal_of(swarm)
    assert node is not None
    before = len(tapped.sent)
    swarm._handle(swarm.peers["alice"], MessageIn(swarm.peers["carol"].key.public, m.pack(m.CaseAsk(deal.id))))
    swarm.run(seconds=2)
    assert not any(isinstance(msg, m.CaseGiven) for _, msg in list(tapped.messages()))
    assert len(tapped.sent) >= before


def hostile(box: bytes | None, seed: int) -> tuple[Simulation, str]:
    """Alice's Opened is changed on its way; None: it keeps its agreement and loses its box."""
    swarm = make_swarm(seed, CALM)
    deliver = swarm._deliver

    def change(target: SimulatedPeer, event: Input) -> None:
        if isinstance(event, MessageIn) and isinstance(message := m.unpack(event.data), m.Opened):
            event = MessageIn(event.peer, m.pack(m.Opened(message.agreement, box or b"")))
        deliver(target, event)

    swarm._deliver = change  # type: ignore[method-assign]
    swarm.run(seconds=3)
    return swarm, submit_sealed(swarm)


@pytest.mark.parametrize("box", [None, b"\0" * 200])
def test_a_solver_without_the_contents_gives_up_and_gets_its_stake_back(box: bytes | None) -> None:
    swarm, job = hostile(box, 11)
    swarm.run(seconds=60)
    assert any(reason.startswith("verification") for _, _, reason in swarm.penalties), swarm.penalties
    swarm.command("alice", "cancel", {"job": job})
    swarm.run(seconds=400)
    swarm.check_quiet()
    bob = swarm.peers["bob"].node
    assert bob is not None
    assert bob.settler.free_stake(bob.desk.me) == 50_000_000 and bob.solver.slots_free() == 1


def test_an_open_job_cannot_take_a_blob_out_of_a_sealed_one_nor_the_other_way_round() -> None:
    swarm, _, job = whole(12)
    task = make_task(swarm.network)
    arguments = {
        "task": encode(task).hex(), "budget_micro": 10_000_000, "unit_price_max": 2000,
        "base_root": initial_root(task.seed).hex(), "checkpoint_bytes": 10_000, "memory_bytes": 2**20,
    }  # fmt: skip
    refused = swarm.command("alice", "submit", arguments).error
    assert refused is not None and refused["code"] == "cannot-seal"
    run(swarm, job)
    assert swarm.command("alice", "submit", arguments).error is not None, "what is hidden stays hidden"
    assert swarm.command("alice", "submit", {**arguments, "sealed": True}).error is None


def test_tolerant_work_is_not_sealed() -> None:
    swarm = make_swarm(13, CALM)
    swarm.run(seconds=3)
    task = msgspec.structs.replace(make_task(swarm.network), mode="tolerant")
    refused = swarm.command(
        "alice",
        "submit",
        {
            "task": encode(task).hex(), "budget_micro": 10_000_000, "unit_price_max": 2000, "sealed": True,
            "base_root": initial_root(task.seed).hex(), "checkpoint_bytes": 10_000, "memory_bytes": 2**20,
        },
    ).error  # fmt: skip
    assert refused is not None and refused["code"] == "cannot-seal"


def test_a_weak_sandbox_does_not_get_a_sealed_job() -> None:
    swarm = make_swarm(14, CALM, bobs_sandbox=2)
    swarm.run(seconds=3)
    state = run(swarm, submit_sealed(swarm))
    assert (state["state"], state["paid_micro"]) == ("done", 66_000), "carol's 1100, for bob is only FILTERED"


@pytest.mark.parametrize("seed", range(12))
def test_no_seed_leaks_or_breaks_a_sealed_job(seed: int) -> None:
    swarm, tapped, job = whole(100 + seed, faults=Faults.drawn_from(seed), cheat="skip-step" if seed % 3 == 0 else "")
    state = run(swarm, job)
    assert (state["state"], state["segments_done"]) == ("done", 6), f"seed {seed}: {state['reason']}"
    boxed = {name for name, message in tapped.messages() if getattr(message, "box", b"")} | {"alice"}
    secrets = secrets_of(swarm)
    wrong = {"in_root", "checkpoint"} if seed % 3 == 0 else set()  # a verdict shows the roots of a wrong segment
    for _, name, event in tapped.sent:
        if name in boxed and isinstance(event, MessageIn):
            continue
        assert isinstance(event, MessageIn | GossipIn)
        for what, secret in secrets.items():
            assert secret not in event.data or what.split()[0] in wrong, f"{name} was sent the {what}"


def test_locators_and_verdicts_are_no_hashes_of_content() -> None:
    swarm, tapped, job = whole(15)
    run(swarm, job)
    node = swarm.peers["alice"].node
    assert node is not None
    (held,) = node.jobs.jobs.values()
    places = [locator_of(Keys(held.key).access(blob)) for blob in CONTENTS]
    right = [r for data in tapped.bytes_to("carol") for r in records_in(data, swarm) if isinstance(r, Verdict)]
    assert right and all(v.claimed_root == v.found_root == bytes(32) for v in right)
    assert not any(place in data for place in places for data in tapped.bytes_to("carol"))


def records_in(data: bytes, swarm: Simulation) -> list[object]:
    """The records of a bundle of gossip; none of a message."""
    found = msgspec.msgpack.decode(data)
    if not isinstance(found, list) or not all(isinstance(one, bytes) for one in found):
        return []
    return [open_record(one, network=swarm.network.id)[0] for one in found]


def test_a_dispute_opens_to_the_notaries_the_program_and_one_state_and_to_nobody_anything_else() -> None:
    swarm = court(21, cheat="skip-step")
    tapped = Tapped(swarm)
    swarm.run(seconds=3)
    job = submit_sealed(swarm)
    state = settle(swarm, job)
    assert (state["state"], state["retried"]) == ("done", 1) and states_of(swarm)[0] == "wrong"
    notaries = {name for name in swarm.peers if name.startswith("notary")}
    seen: set[bytes] = set()
    for name, message in tapped.messages():
        if isinstance(message, m.DisputeOpen) and message.case.box:
            assert name in notaries
            keys = read_keys(swarm.peers[name].key.open_box(message.case.box))
            assert not keys.job, "a notary never gets the key of the whole job"
            seen |= {blob for blob, _ in keys.blobs}
    assert program_id(PROGRAM.to_bytes()) in seen and not {TASK_DATA} & seen and len(seen) == 2
    assert all(program_id(PROGRAM.to_bytes()) in swarm.peers[name].blobs for name in notaries)
    assert not any(TASK_DATA in swarm.peers[name].blobs for name in notaries), "the data is not theirs"
    held = {(k["role"], k["opens"]) for k in state["keys"]}
    assert ("notary", "program and one state") in held
    # Who has no part in it: wendy, who checked nothing here, and all of gossip.
    boxed = {name for name, message in tapped.messages() if getattr(message, "box", b"")} | notaries | {"alice"}
    outside = set(swarm.peers) - boxed
    secrets = {k: v for k, v in secrets_of(swarm).items() if k.split()[0] not in ("in_root", "checkpoint")}
    for name in outside:
        assert not any(s in data for s in secrets.values() for data in tapped.bytes_to(name)), name
