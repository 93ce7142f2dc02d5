"""The house pays who proves by surprise what its ask claims, once a period, within its budget, and nobody else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from peer.channel import Channel
from peer.desk import Means
from peer.events import Emit, MessageIn, Penalise, Post, Save
from peer.messages import HousePay, pack
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from protocol.errors import VerificationFailed
from protocol.house import AVAILABILITY_NS, availability_micro, is_availability, pay_settlement
from protocol.keys import SigningKey, peer_name
from protocol.network import BadNetworkFile, Deposit, House, Network, Rules, dump, load
from protocol.records import Agreement, Settlement, add_signature, open_record, seal

CALM = Faults(until_ns=0)
HOUR = AVAILABILITY_NS // SECOND
MEMORY = 40 * params.BENCH_MEMORY_BLOCK_BYTES
RATE = 1_000_000  # a credit for a tera-operation a second and hour: 10,000 micro-credits for the simulator's machines


def market(
    newcomers: int = 3, *, seed: int = 1, faults: Faults = CALM, daily_micro: int = 10**6, funds: int = 10**8,
    claims: dict[str, int] | None = None, rate: int = RATE,
) -> Simulation:  # fmt: skip
    """A house, and newcomers without a deposit that ask for work at 10 Gop/s, or at what they claim."""
    names = ["house", *(f"peer{number}" for number in range(newcomers))]
    keys = {name: SigningKey.from_seed(bytes([seed, i]) * 16) for i, name in enumerate(names)}
    house = peer_name(keys["house"].public)
    network = Network(
        "cold", Rules(), (Deposit(house, funds, 0),),
        house=House(peer=house, daily_micro=daily_micro, availability_micro_per_hour=rate),
    )  # fmt: skip
    means = {
        name: Means(
            roles=int(name != "house"), unit_price=1, memory_bytes=MEMORY,
            operations_per_second=(claims or {}).get(name, 2 * 10**9),
        )
        for name in names
    }  # fmt: skip
    simulation = Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)
    # Hours pass in which little happens, and where no message is lost none waits to be repeated after two seconds.
    simulation.tick_ns = 5 * SECOND if faults is CALM else SECOND
    return simulation


def node(simulation: Simulation, name: str) -> Node:
    found = simulation.peers[name].node
    assert found is not None, f"{name} is down"
    return found


def earned(simulation: Simulation, name: str) -> list[int]:
    """What `ichiba earn report` adds up, of availability."""
    rows = simulation.command(name, "earnings", {}).result["earnings"]
    assert {row["role"] for row in rows} <= {"available"}
    return [row["micro"] for row in rows]


def told(simulation: Simulation, kind: str, name: str = "house") -> list[dict[str, Any]]:
    return [data for _, who, what, data in simulation.log if (who, what) == (name, kind)]


def free(simulation: Simulation, name: str, by: str = "house") -> int:
    """What a peer has to spend, as another knows it."""
    return node(simulation, by).settler.free_micro(simulation.peers[name].key.public)


# --- who is paid -----------------------------------------------------------------------------------------------
def test_every_newcomer_that_proves_its_ask_is_paid_once_an_hour_out_of_the_house() -> None:
    simulation = market()
    for hour in (1, 2):
        simulation.run(seconds=HOUR)
        for name in ("peer0", "peer1", "peer2"):
            assert len(earned(simulation, name)) == hour
            assert all(5_000 < micro <= 10_000 for micro in earned(simulation, name)), "what 10 Gop/s come to"
    paid = sum(sum(earned(simulation, f"peer{i}")) for i in range(3))
    assert free(simulation, "house") == 10**8 - paid
    assert free(simulation, "peer0", by="peer1") == sum(earned(simulation, "peer0")), "and everybody knows it"
    assert not simulation.penalties
    simulation.check_quiet()


def test_who_earned_so_has_a_deposit_and_no_record_of_work() -> None:
    simulation = market()
    simulation.run(seconds=HOUR)
    peer = simulation.peers["peer0"].key.public
    house = node(simulation, "house")
    assert free(simulation, "peer0") > 0
    assert house.settler.history(peer).right == 0
    assert simulation.command("house", "trades", {}).result["trades"] == []


def test_the_moment_is_another_one_each_hour_and_the_same_for_all() -> None:
    simulation = market()
    simulation.run(seconds=3 * HOUR)
    calls = [at for at, who, kind, _ in simulation.log if (who, kind) == ("house", "house-called")]
    assert len(calls) == 3 or len(calls) == 4, "one batch an hour"
    assert len({at % AVAILABILITY_NS // (60 * SECOND) for at in calls}) > 1


def test_who_asks_at_a_speed_it_does_not_have_gets_nothing_before_it_asks_at_what_it_proved() -> None:
    simulation = market(claims={"peer0": 50 * 10**9})
    simulation.run(seconds=HOUR)
    assert earned(simulation, "peer0") == []
    assert [one["code"] for one in told(simulation, "house-unpaid")] == ["claim"]
    assert len(earned(simulation, "peer1")) == 1
    simulation.run(seconds=HOUR)
    assert len(earned(simulation, "peer0")) == 1, "its card has corrected its ask"


@pytest.mark.parametrize("lie", ["claim", "result", "memory"])
def test_who_fails_its_challenge_gets_nothing(lie: str) -> None:
    simulation = market()
    simulation.peers["peer0"].bench_lie = lie
    simulation.run(seconds=2 * HOUR)
    assert earned(simulation, "peer0") == []
    assert len(earned(simulation, "peer1")) == 2


def test_a_challenge_that_nobody_called_for_is_not_paid() -> None:
    """No surprise, no pay: the owner could have stopped everything else for it."""
    simulation = market()
    simulation.run(seconds=2)
    house = peer_name(simulation.peers["house"].key.public)
    reply = simulation.command("peer0", "bench", {"peer": house})
    assert reply.error is None
    simulation.run(seconds=120, until=lambda: bool(told(simulation, "proven")))
    assert told(simulation, "proven")
    assert not told(simulation, "house-pays")


def test_one_machine_behind_many_names_is_paid_no_more_than_one() -> None:
    """Ten names that describe themselves differently share one device of 10 Gop/s, challenged at the same moment."""
    simulation = market(10)
    for number in range(10):
        simulation.peers[f"peer{number}"].bench_speed //= 10
    simulation.run(seconds=HOUR)
    alone = market(1)
    alone.run(seconds=HOUR)
    together = sum(sum(earned(simulation, f"peer{number}")) for number in range(10))
    assert together <= sum(earned(alone, "peer0")) * 1.01


# --- how much --------------------------------------------------------------------------------------------------
def test_the_budget_of_a_day_holds_and_the_next_day_has_its_own() -> None:
    simulation = market(daily_micro=25_000)
    spent: dict[int, int] = {}
    for _ in range(5):  # from 22:13 on
        simulation.run(seconds=HOUR)
        spent = {}
        for number in range(3):
            for row in simulation.command(f"peer{number}", "earnings", {}).result["earnings"]:
                day = row["time_ns"] // (24 * AVAILABILITY_NS)
                spent[day] = spent.get(day, 0) + row["micro"]
        assert all(micro <= 25_000 for micro in spent.values()), spent
    assert len(spent) == 2
    assert all(micro > 15_000 for micro in spent.values()), "and it is used"
    assert "budget" in {one["code"] for one in told(simulation, "house-unpaid")}


def test_a_house_without_money_pays_nobody() -> None:
    simulation = market(funds=5_000)
    simulation.run(seconds=HOUR)
    assert [earned(simulation, f"peer{number}") for number in range(3)] == [[], [], []]
    assert {one["code"] for one in told(simulation, "house-unpaid")} == {"funds"}
    simulation.check_quiet()


@pytest.mark.parametrize("seed", range(3))
def test_no_loss_delay_or_crash_pays_twice_for_one_hour(seed: int) -> None:
    faults = Faults(loss=0.15, duplication=0.2, crash=0.001, until_ns=2 * AVAILABILITY_NS)
    simulation = market(seed=40 + seed, faults=faults)
    simulation.run(seconds=3 * HOUR + 60)
    for number in range(3):
        hours = [
            row["time_ns"] // AVAILABILITY_NS
            for row in simulation.command(f"peer{number}", "earnings", {}).result["earnings"]
        ]
        assert 1 <= len(hours) <= 4, "the fourth hour has begun"
    pays = node(simulation, "house").house.pays.values()
    assert len({(pay.peer, pay.period) for pay in pays}) == len(pays)
    paid = node(simulation, "house").settler.channels
    assert paid.keys() <= {pay.deal for pay in pays}
    assert all(is_availability(channel.agreement, simulation.network) for channel in paid.values())
    assert not simulation.penalties
    simulation.check_quiet()


# --- hostile ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", ["another house", "a lock", "checked", "less", "fees", "to another", "work"])
def test_a_pay_that_binds_its_peer_or_is_no_pay_is_not_signed(wrong: str) -> None:
    simulation = market(2)
    simulation.run(seconds=HOUR)
    (pay, *_) = node(simulation, "house").house.pays.values()
    network = simulation.network.id
    agreement, _, _ = open_record(pay.agreement, network=network)
    assert isinstance(agreement, Agreement)
    signer = simulation.peers["house"].key
    changes: dict[str, Any] = {"sequence": agreement.sequence + 1}
    changes |= {
        "a lock": {"lock_micro": 1}, "checked": {"check_permille": 1000}, "work": {"task": bytes(32)},
        "to another": {"solver": simulation.peers["house"].key.public},
    }.get(wrong, {})  # fmt: skip
    if wrong == "another house":
        signer = SigningKey.from_seed(b"e" * 32)
        changes["submitter"] = signer.public
    agreement = msgspec.structs.replace(agreement, **changes)
    envelope = seal(agreement, signer)
    settlement: Settlement = pay_settlement(agreement, open_record(envelope, network=network)[1])
    if wrong == "less":
        settlement = msgspec.structs.replace(settlement, paid_micro=settlement.paid_micro - 1)
    elif wrong == "fees":
        settlement = msgspec.structs.replace(settlement, paid_micro=0, fees=((signer.public, settlement.paid_micro),))
    name = simulation.by_key[pay.peer].name
    message = HousePay(envelope, seal(settlement, signer))
    effects = node(simulation, name).handle(MessageIn(signer.public, pack(message)), simulation.now_ns)
    assert not [e for e in effects if isinstance(e, Save | Post)]
    assert [e for e in effects if isinstance(e, Penalise)]
    assert [e.data["code"] for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"]


def test_a_pay_cannot_be_made_without_the_house() -> None:
    """A peer that writes its own pay has one signature too few for the ledger."""
    simulation = market(2)
    simulation.run(seconds=HOUR)
    (pay, *_) = node(simulation, "house").house.pays.values()
    agreement, _, _ = open_record(pay.agreement, network=simulation.network.id)
    assert isinstance(agreement, Agreement)
    forged = msgspec.structs.replace(agreement, sequence=1)
    own = seal(forged, simulation.by_key[pay.peer].key)
    with pytest.raises(VerificationFailed, match="without the signature of each party"):
        node(simulation, "house").settler.accept(own)
    assert add_signature(own, simulation.by_key[pay.peer].key, network=simulation.network.id) == own


def opened_alone(simulation: Simulation, *, keep: bool) -> tuple[str, bytes, HousePay]:
    """A pay of the house whose agreement alone is open: at its peer, by name, and with its id and the message."""
    simulation.run(seconds=HOUR)
    house = node(simulation, "house").house
    (old, *_) = house.pays.values()
    terms, _, _ = open_record(old.agreement, network=simulation.network.id)
    assert isinstance(terms, Agreement)
    envelope = seal(msgspec.structs.replace(terms, sequence=terms.sequence + 1), simulation.peers["house"].key)
    agreement, deal, _ = open_record(envelope, network=simulation.network.id)
    assert isinstance(agreement, Agreement)
    settlement = seal(pay_settlement(agreement, deal), simulation.peers["house"].key)
    if keep:
        house.pays[b"x" * 40] = msgspec.structs.replace(old, deal=deal, agreement=envelope, settlement=settlement)
    name = simulation.by_key[old.peer].name
    both = add_signature(envelope, simulation.peers[name].key, network=simulation.network.id)
    for each in (name, "house"):
        assert node(simulation, each).settler.accept(both)
    return name, deal, HousePay(envelope, settlement)


def test_a_pay_that_waited_for_funds_and_opened_by_itself_is_settled_when_it_is_offered_again() -> None:
    simulation = market(2)
    name, deal, message = opened_alone(simulation, keep=False)
    peer, before = node(simulation, name), free(simulation, name, name)
    peer.handle(MessageIn(simulation.peers["house"].key.public, pack(message)), simulation.now_ns)
    channel = peer.settler.channels[deal]
    assert channel.closed == "settled"
    assert free(simulation, name, name) == before + channel.agreement.channel_micro


def test_the_house_takes_back_what_a_peer_opens_and_never_settles() -> None:
    simulation = market(2)
    _, deal, _ = opened_alone(simulation, keep=True)
    simulation.run(seconds=4 * HOUR)
    channel = node(simulation, "house").settler.channels[deal]
    assert (channel.closed, channel.paid_micro) == ("claimed", 0)


def test_the_house_takes_back_what_opens_when_it_has_forgotten_the_pay() -> None:
    simulation = market(2)
    _, deal, _ = opened_alone(simulation, keep=False)
    simulation.run(seconds=4 * HOUR)
    channel = node(simulation, "house").settler.channels[deal]
    assert (channel.closed, channel.paid_micro) == ("claimed", 0)


def test_who_is_not_the_house_makes_nobody_search_its_log_for_a_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = market(2)
    simulation.run(seconds=HOUR)
    (pay, *_) = node(simulation, "house").house.pays.values()
    stranger, house = simulation.peers["peer0"], node(simulation, "peer1").house
    terms, _, _ = open_record(pay.agreement, network=simulation.network.id)
    assert isinstance(terms, Agreement)
    agreement = msgspec.structs.replace(terms, submitter=stranger.key.public, solver=pay.peer)
    envelope = seal(agreement, stranger.key)
    deal = open_record(envelope, network=simulation.network.id)[1]
    house.settler.channels[deal] = Channel(agreement, closed="settled")
    searched: list[bytes] = []
    monkeypatch.setattr(type(house), "_closing", lambda _, found: searched.append(found) or [])
    settlement = seal(pay_settlement(agreement, deal), stranger.key)
    with pytest.raises(VerificationFailed):
        house.on_pay(stranger.key.public, HousePay(envelope, settlement))
    assert not searched


# --- the network file ------------------------------------------------------------------------------------------
def test_a_house_is_named_in_the_network_file_and_changes_its_id() -> None:
    network = market().network
    assert load(dump(network)) == network
    without = Network(network.name, network.rules, network.deposits)
    assert without.id != network.id
    assert availability_micro(network.house, _Card(5 * 10**11)) == RATE // 2  # type: ignore[arg-type]


class _Card:
    def __init__(self, speed: int) -> None:
        self.operations_per_second = speed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[house]\npeer = "x"', "all of them"),
        ("house = 3", "all of them"),
        ('[house]\npeer = "PEER"\ndaily_micro = -1\navailability_micro_per_hour = 1', "does not fit"),
        ('[house]\npeer = "PEER"\ndaily_micro = 1\navailability_micro_per_hour = 1\nmore = 1', "all of them"),
        ('[house]\npeer = "PEER"\ndaily_micro = 1\navailability_micro_per_hour = 1', "no deposit"),
        ("[reruns]\ndaily_micro = 1\npeer_daily_micro = 1\nunit_price = 1", "without a .house."),
        ("[reruns]\ndaily_micro = 1\npeer_daily_micro = 1\nunit_price = 0", "does not fit"),
        ("[reruns]\ndaily_micro = 1\nunit_price = 1", "all of them"),
    ],
)
def test_a_bad_house_is_refused_with_the_reason(text: str, complaint: str) -> None:
    name = peer_name(SigningKey.from_seed(b"p" * 32).public)
    with pytest.raises(BadNetworkFile, match=complaint):
        load('name = "x"\n' + text.replace("PEER", name))
