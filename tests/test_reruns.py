"""The house pays newcomers for running its finished work on, by the root that it found itself, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from peer import simulator
from peer.deals import agreement_of, task_of
from peer.desk import Means
from peer.node import Node
from peer.reruns import DAY_NS, Rerun
from peer.simulated_frauds import WRONG_END, WRONG_PRODUCT
from peer.simulated_work import CONTENTS, initial_root
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from protocol.codec import encode
from protocol.house import KNOWN_END
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, House, Network, Reruns, dump, load
from protocol.records import ROLE_SOLVER
from protocol.task import TaskSpec
from tests.swarm_scenario import RULES, make_task

CALM = Faults(until_ns=0)
MEMORY = 40 * params.BENCH_MEMORY_BLOCK_BYTES
TERMS = Reruns(daily_micro=100_000, peer_daily_micro=25_000, unit_price=1000)
STEPS = 10  # of a giga-operation each, of a re-run where the budget bears it
STAFF = ("bob", "victor", "vera")  # who did the house's own job, and who checked it


def market(
    newcomers: int = 2, *, seed: int = 1, faults: Faults = CALM, terms: Reruns = TERMS, notaries: int = 0,
    work: bool = True, price: int = 900,
) -> Simulation:  # fmt: skip
    """A house with a finished job, done and checked by peers with a stake, and newcomers without a credit."""
    fresh = [f"new{number}" for number in range(newcomers)]
    judges = [f"notary{number}" for number in range(notaries)]
    staff = STAFF if work else ()
    names = ["house", *staff, *fresh, *judges]
    keys = {name: SigningKey.from_seed(bytes([seed, i]) * 16) for i, name in enumerate(names)}
    named = {name: peer_name(keys[name].public) for name in names}
    deposits = (Deposit(named["house"], 10**8, 0), *(Deposit(named[name], 0, 10**8) for name in staff))
    network = Network(
        "cold", RULES, deposits, notaries=tuple(named[name] for name in judges), reruns=terms,
        house=House(peer=named["house"], daily_micro=10**6, availability_micro_per_hour=10**6),
    )  # fmt: skip
    roles = dict.fromkeys(fresh, 1) | {"bob": 1, "victor": 2, "vera": 2}
    means = {
        name: Means(
            roles=roles.get(name, 0), unit_price=price, memory_bytes=MEMORY, sandbox=4,
            operations_per_second=2 * 10**9, fixed_price=True,
        )
        for name in names
    }  # fmt: skip
    simulation = Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)
    simulation.tick_ns = SECOND
    simulation.run(seconds=2)
    if work:
        finish_a_job(simulation)
    return simulation


def finish_a_job(simulation: Simulation, **changes: Any) -> None:
    """The house has a job of two segments done by whoever is cheapest and has a stake."""
    task = msgspec.structs.replace(make_task(simulation.network, segments=2), **changes)
    simulation.peers["house"].blobs |= set(CONTENTS)
    terms = {"budget_micro": 10**6, "unit_price_max": 2000, "base_root": initial_root(task.seed).hex()}
    terms |= {"checkpoint_bytes": 10_000, "memory_bytes": 2**16, "sandbox": 2}
    reply = simulation.command("house", "submit", {"task": encode(task).hex(), **terms})
    assert reply.error is None, reply.error

    def done() -> bool:
        at = simulation.peers["house"].node
        return at is not None and not at.jobs.jobs[bytes.fromhex(reply.result["job"])].open

    simulation.run(seconds=900, until=done)
    assert simulation.command("house", "job", {"job": reply.result["job"]}).result["state"] == "done"


def prove(simulation: Simulation, *names: str) -> None:
    """Each gets a bench card that the house timed."""
    house = peer_name(simulation.peers["house"].key.public)
    for name in names:
        assert simulation.command(name, "bench", {"peer": house}).error is None
    keys = {simulation.peers[name].key.public for name in names}
    simulation.run(seconds=120, until=lambda: keys <= node(simulation, "house").challenger.proven.keys())


def node(simulation: Simulation, name: str) -> Node:
    found = simulation.peers[name].node
    assert found is not None, f"{name} is down"
    return found


def orders(simulation: Simulation) -> list[Rerun]:
    return list(node(simulation, "house").house.reruns.rows.values())


def earned(simulation: Simulation, name: str) -> list[int]:
    """What re-runs brought, by the earnings report."""
    rows = simulation.command(name, "earnings", {}).result["earnings"]
    return [row["micro"] for row in rows if row["role"] == "rerun"]


def part(simulation: Simulation, name: str, of: str = "rerun") -> dict[str, Any]:
    found = simulation.command(name, "house", {}).result
    return next(one for one in found["pays"] if one["part"] == of)


def settle_down(simulation: Simulation, *, seconds: int = 400) -> None:
    """Until no order is open any more and nobody is ordered another one today."""
    simulation.run(seconds=seconds)
    assert all(row.outcome for row in orders(simulation)), [row.outcome for row in orders(simulation)]
    simulation.run(seconds=60)
    simulation.check_quiet()


# --- who earns -------------------------------------------------------------------------------------------------
def test_a_newcomer_without_a_credit_earns_its_first_ones_until_its_day_is_spent() -> None:
    simulation = market()
    prove(simulation, "new0", "new1")
    settle_down(simulation)
    for name in ("new0", "new1"):
        pays = earned(simulation, name)
        assert pays[:2] == [9_000, 9_000], "ten giga-operations at the 900 that it asks"
        assert 9_000 <= sum(pays) <= TERMS.peer_daily_micro
        assert part(simulation, name)["today_micro"] == sum(pays)
        by_others = node(simulation, "victor").settler.free_micro(simulation.peers[name].key.public)
        assert by_others == sum(pays), "and everybody knows it"
    assert {row.outcome for row in orders(simulation)} == {"paid"}


def test_it_is_paid_work_that_made_it_no_history_and_no_price() -> None:
    simulation = market(1)
    prove(simulation, "new0")
    before = len(simulation.command("victor", "trades", {}).result["trades"])
    settle_down(simulation)
    key = simulation.peers["new0"].key.public
    assert earned(simulation, "new0")
    assert node(simulation, "house").settler.history(key).right == 0
    assert len(simulation.command("victor", "trades", {}).result["trades"]) == before
    deals = node(simulation, "new0").solver.deals.values()
    terms = [agreement_of(deal, simulation.network.id) for deal in deals]
    assert {(one.lock_micro, one.check_permille) for one in terms} == {(0, 0)}
    told = simulation.command("house", "job", {"job": orders(simulation)[0].id.hex()}).result
    assert (told["state"], told["assurance"]) == ("done", KNOWN_END)


def test_every_order_runs_on_from_the_settled_end_under_a_seed_of_its_own() -> None:
    simulation = market()
    prove(simulation, "new0", "new1")
    settle_down(simulation)
    job = next(job for job in node(simulation, "house").jobs.jobs.values() if not job.only)
    tasks = [task_of(row.task) for row in orders(simulation)]
    assert len(tasks) >= 4
    assert {task.initial.root for task in tasks if isinstance(task, TaskSpec)} == {job.base_root}
    assert len({task.seed for task in tasks}) == len(tasks)
    assert len({row.root for row in orders(simulation)}) == len(tasks), "so no two have one answer"


def test_only_the_newcomer_that_it_is_for_hears_of_an_order() -> None:
    simulation = market()
    prove(simulation, "new0")
    simulation.run(seconds=60, until=lambda: any(row.root for row in orders(simulation)))
    (row,) = [row for row in orders(simulation) if not row.outcome]
    simulation.run(seconds=1)
    offer = node(simulation, "house").jobs.jobs[row.id].offer_id
    knows = {name for name in simulation.peers if offer in node(simulation, name).desk.book.offers}
    assert knows <= {"house", "new0"}


# --- who does not ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lie", [WRONG_PRODUCT, WRONG_END])
def test_an_answer_that_is_not_the_houses_own_earns_nothing_and_no_second_order(lie: str) -> None:
    simulation = market()
    simulation.peers["new0"].liar, simulation.peers["new0"].lie = True, lie
    prove(simulation, "new0", "new1")
    settle_down(simulation)
    assert earned(simulation, "new0") == []
    assert node(simulation, "house").settler.free_micro(simulation.peers["new0"].key.public) == 0
    mine = [row for row in orders(simulation) if row.peer == simulation.peers["new0"].key.public]
    assert [(row.outcome, row.micro) for row in mine] == [("wrong", 0)]
    assert earned(simulation, "new1"), "the house has its money back for others"


def test_a_root_that_was_published_or_another_was_paid_for_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that hands in every root it can find: ends of the source, and of what others did for the house."""
    simulation = market()
    prove(simulation, "new1")
    simulation.run(seconds=60, until=lambda: bool(earned(simulation, "new1")))
    house, cheat = node(simulation, "house"), node(simulation, "new0")
    (source,) = [job for job in house.jobs.jobs.values() if not job.only]
    published = [source.base_root, *(row.root for row in orders(simulation) if row.outcome == "paid")]
    on_segment, tried = cheat.solver.on_segment, []

    def copied(event: Any) -> None:
        tried.append(published[len(tried) % len(published)])
        on_segment(replace(event, out_root=tried[-1]))

    for answer in range(len(published)):
        monkeypatch.setattr(cheat.solver, "on_segment", copied)
        if not answer:
            prove(simulation, "new0")
        for row in house.house.reruns.rows.values():  # let it try the next one: a house would not
            if row.outcome == "wrong":
                row.outcome, row.ended_ns = "failed", 1
        simulation.run(seconds=90, until=lambda many=answer: len(tried) > many)  # type: ignore[misc]
    simulation.run(seconds=90)
    assert set(tried) == set(published)
    assert earned(simulation, "new0") == []


@pytest.mark.parametrize(
    ("what", "code"), [("price", "price"), ("card", "no-card"), ("off", ""), ("stake", "staked"), ("source", "")]
)
def test_who_gets_no_order_is_told_why_in_one_word(what: str, code: str) -> None:
    simulation = market(1, price=1100 if what == "price" else 900, work=what != "source")
    if what == "off":
        assert simulation.command("new0", "house-want", {"on": False}).result["on"] is False
    name = "bob" if what == "stake" else "new0"
    if what not in ("card", "off"):
        prove(simulation, name)
    if what == "off":
        house = node(simulation, "house")
        house.challenger.invite(simulation.peers["new0"].key.public)
    simulation.run(seconds=60)
    assert earned(simulation, "new0") == [] or what == "stake"
    told = simulation.command("house", "house", {}).result["unpaid"]
    if code:
        assert {"peer": peer_name(simulation.peers[name].key.public), "code": code} in [
            {"peer": one["peer"], "code": one["code"]} for one in told
        ]
        assert part(simulation, name)["reason"]["code"] == code
    elif what == "source":
        assert ("", "no-source") in [(one["peer"], one["code"]) for one in told]
    else:
        assert part(simulation, name)["reason"]["code"] == "house-off"
        assert not node(simulation, "house").challenger.proven, "nor is it challenged"


def test_who_wants_nothing_of_the_house_is_asked_in_vain_over_a_restart_too() -> None:
    simulation = market(1)
    prove(simulation, "new0")
    simulation.command("new0", "house-want", {"on": False})
    simulation.crash("new0", for_ns=SECOND)
    simulation.run(seconds=200)
    assert earned(simulation, "new0") == []
    assert {row.outcome for row in orders(simulation)} <= {"", "unanswered"}
    assert part(simulation, "new0")["reason"]["code"] == "house-off"
    assert simulation.command("new0", "house-want", {"on": True}).result["on"] is True
    simulation.run(seconds=params.RERUN_REST_NS // SECOND + 120)
    assert earned(simulation, "new0")


def test_one_that_takes_none_is_withdrawn_and_others_go_first() -> None:
    simulation = market()
    prove(simulation, "new0", "new1")
    simulation.command("new0", "house-want", {"on": False})
    settle_down(simulation)
    idle = [row for row in orders(simulation) if row.peer == simulation.peers["new0"].key.public]
    assert {row.outcome for row in idle} == {"unanswered"} and not sum(row.micro for row in idle)
    assert len(earned(simulation, "new1")) >= 2


# --- how much --------------------------------------------------------------------------------------------------
def test_no_budget_is_ever_exceeded_and_the_next_day_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "START_NS", simulator.START_NS // DAY_NS * DAY_NS + DAY_NS - 700 * SECOND)
    terms = Reruns(daily_micro=35_000, peer_daily_micro=20_000, unit_price=1000)
    simulation = market(3, terms=terms)
    prove(simulation, "new0", "new1", "new2")
    names = [f"new{number}" for number in range(3)]
    spent: dict[tuple[int, str], int] = {}
    for _ in range(12):  # to ten minutes past midnight
        simulation.run(seconds=110)
        spent = {}
        for name in names:
            for row in simulation.command(name, "earnings", {}).result["earnings"]:
                if row["role"] == "rerun":
                    at = (row["time_ns"] // DAY_NS, name)
                    spent[at] = spent.get(at, 0) + row["micro"]
        days = {day for day, _ in spent}
        assert all(micro <= terms.peer_daily_micro for micro in spent.values())
        assert all(sum(m for (d, _), m in spent.items() if d == day) <= terms.daily_micro for day in days)
    assert len({day for day, _ in spent}) == 2
    first = min(day for day, _ in spent)
    assert sum(m for (d, _), m in spent.items() if d == first) > 26_000, "and it is used"
    left = {part(simulation, name)["left_today_micro"] for name in names}
    assert all(micro < 1000 for micro in left), "no step more can be paid"
    simulation.check_quiet()


def test_ten_names_of_one_machine_are_drawn_no_more_often_than_one_would_be() -> None:
    """Odds go by the speed that was proved, and ten that share a machine prove a tenth each."""
    simulation = market(2, terms=Reruns(daily_micro=10**7, peer_daily_micro=10**7, unit_price=1000))
    simulation.peers["new0"].bench_speed = 10**9
    prove(simulation, "new0")
    prove(simulation, "new1")
    house = node(simulation, "house")
    asks = house.desk.book.live_asks(role=ROLE_SOLVER, now_ns=simulation.now_ns)
    speeds = {simulation.by_key[ask.peer].name: house.house.reruns.newcomer(ask).proven for ask in asks}
    assert 8 < speeds["new1"] / speeds["new0"] < 12


# --- faults ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_no_loss_delay_or_crash_orders_or_pays_twice(seed: int) -> None:
    faults = Faults(loss=0.1, duplication=0.1, crash=0.002, until_ns=600 * SECOND)
    simulation = market(seed=60 + seed, faults=replace(faults, until_ns=0))
    prove(simulation, "new0", "new1")
    simulation.faults = replace(faults, until_ns=simulation.now_ns - simulator.START_NS + 300 * SECOND)
    simulation.run(seconds=1500)
    settle_down(simulation)
    rows = orders(simulation)
    assert any(row.outcome == "paid" for row in rows)
    for name in ("new0", "new1"):
        key = simulation.peers[name].key.public
        assert sum(earned(simulation, name)) == sum(row.micro for row in rows if row.peer == key)
        assert sum(earned(simulation, name)) <= TERMS.peer_daily_micro


def test_a_house_that_restarts_in_its_own_run_begins_it_again_and_orders_once() -> None:
    simulation = market(1)
    prove(simulation, "new0")
    simulation.run(seconds=60, until=lambda: bool(orders(simulation)))
    (first,) = orders(simulation)
    assert not first.root
    simulation.crash("house", for_ns=SECOND)
    simulation.run(seconds=90)
    assert first.id in {row.id for row in orders(simulation) if row.outcome == "paid"}
    settle_down(simulation)


def test_a_paused_house_orders_nothing_and_goes_on_afterwards() -> None:
    simulation = market(1)
    prove(simulation, "new0")
    simulation.run(seconds=60, until=lambda: bool(orders(simulation)))
    simulation.command("house", "pause", {})
    simulation.run(seconds=200)
    assert [row.outcome for row in orders(simulation)] == [""] and not orders(simulation)[0].root
    simulation.command("house", "resume", {})
    settle_down(simulation)
    assert earned(simulation, "new0")


def test_a_source_whose_blobs_are_gone_is_given_up() -> None:
    simulation = market(1)
    (job,) = node(simulation, "house").jobs.jobs.values()
    for peer in simulation.peers.values():
        peer.blobs.discard(job.base_blob)
    prove(simulation, "new0")
    settle_down(simulation)
    assert [(row.outcome, row.micro) for row in orders(simulation)] == [("failed", 0)]
    assert "no-source" in [one["code"] for one in simulation.command("house", "house", {}).result["unpaid"]]


# --- notaries --------------------------------------------------------------------------------------------------
def test_notaries_certify_both_kinds_of_pay() -> None:
    simulation = market(2, notaries=4)
    simulation.run(seconds=3700)
    settle_down(simulation)
    for name in ("new0", "new1"):
        roles = [row["role"] for row in simulation.command(name, "earnings", {}).result["earnings"]]
        assert "available" in roles and "rerun" in roles
    assert not node(simulation, "house").house.deals, "nothing is in doubt"
    assert all(not node(simulation, f"notary{n}").certificates.notary.rows for n in range(4)), "and nothing set aside"


@pytest.mark.parametrize("down", [2, 3])
def test_a_pay_that_no_quorum_certifies_in_time_comes_late_or_never(down: int) -> None:
    """Two that signed prove that an honest one did: it opens when the others are back. One alone lets go of it."""
    simulation = market(1, notaries=4, work=False)
    for number in range(down):
        simulation.crash(f"notary{number}", for_ns=0)
    house = node(simulation, "house").house
    simulation.run(seconds=3700, until=lambda: any(pay.given_up for pay in house.pays.values()))
    assert part(simulation, "new0", "available")["earned_micro"] == 0
    unpaid = [data["code"] for _, who, kind, data in simulation.log if (who, kind) == ("house", "house-unpaid")]
    assert unpaid and set(unpaid) <= {"silence"}
    (first,) = house.pays.values()
    assert first.given_up
    for number in range(down):
        simulation._boot(simulation.peers[f"notary{number}"])
    simulation.run(seconds=6000, until=lambda: first.deal not in house.deals)
    assert first.deal not in house.deals, "what was given up is brought to its end"
    closed = {deal: channel.closed for deal, channel in house.settler.channels.items()}
    assert closed.get(first.deal) == ("settled" if down == 2 else None)
    simulation.run(seconds=5)
    assert all(not node(simulation, f"notary{n}").certificates.notary.free for n in range(4)), "nothing is set aside"
    simulation.run(seconds=3600, until=lambda: bool(part(simulation, "new0", "available")["earned_micro"]))
    assert part(simulation, "new0", "available")["earned_micro"] > 0, "and other hours are paid"


@pytest.mark.parametrize("wrong", ["settlement", "half", "unknown"])
def test_the_house_certifies_nothing_but_what_it_offered(wrong: str) -> None:
    from peer.events import MessageIn, Penalise
    from peer.messages import HousePay, pack
    from protocol.house import pay_settlement
    from protocol.records import Agreement, add_signature, open_record, seal

    simulation = market(1, notaries=4, work=False)
    simulation.run(seconds=3700, until=lambda: bool(node(simulation, "house").house.pays))
    (pay,) = node(simulation, "house").house.pays.values()
    key, network = simulation.peers["new0"].key, simulation.network.id
    agreement, deal, _ = open_record(pay.agreement, network=network)
    assert isinstance(agreement, Agreement)
    first, second = (add_signature(one, key, network=network) for one in (pay.agreement, pay.settlement))
    if wrong == "settlement":
        second = seal(msgspec.structs.replace(pay_settlement(agreement, deal), proof=bytes(32)), key)
    elif wrong == "half":
        second = pay.settlement
    else:
        first = seal(msgspec.structs.replace(agreement, channel_micro=10**7), key)
    house = node(simulation, "house")
    effects = house.handle(MessageIn(key.public, pack(HousePay(first, second))), simulation.now_ns)
    assert [e for e in effects if isinstance(e, Penalise)]
    assert not house.house.deals


# --- the network file ------------------------------------------------------------------------------------------
def test_reruns_are_named_in_the_network_file_and_a_house_without_them_keeps_its_id() -> None:
    network = market(1, work=False, notaries=4).network
    assert load(dump(network)) == network
    without = Network(network.name, network.rules, network.deposits, notaries=network.notaries, house=network.house)
    assert load(dump(without)) == without
    assert without.id != network.id
