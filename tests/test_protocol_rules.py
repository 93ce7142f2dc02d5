"""The lifecycle table, the network file, and the draw of segments and checkers."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import blake
from protocol.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.lifecycle import TERMINAL, TRANSITIONS, Event, State, diagram, step
from protocol.network import BadNetworkFile, Deposit, Network, Rules, dump, load
from protocol.sampling import check_reveal, commitment, draw, randomness, select_segments
from protocol.task import Schedule, TaskSpec, learning_rate
from tests.swarm_scenario import make_task

PEER = peer_name(SigningKey.from_seed(b"p" * 32).public)


@pytest.mark.parametrize(("state", "event"), product(State, Event))
def test_every_state_and_event_is_a_row_or_raises(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert step(state, event) == TRANSITIONS[state, event].next
        assert state not in TERMINAL
    else:
        with pytest.raises(LocalProtocolError, match=event.name):
            step(state, event)


def test_every_state_can_end_and_every_payment_is_named() -> None:
    reach = {State.PROPOSED}
    while True:
        more = {row.next for (state, _), row in TRANSITIONS.items() if state in reach} - reach
        if not more:
            break
        reach |= more
    assert reach == set(State)
    for state in set(State) - TERMINAL:
        assert any(s == state for s, _ in TRANSITIONS), f"{state.name} is a dead end"
    for (_, _), row in TRANSITIONS.items():
        if row.next in (State.SETTLED, State.SLASHED, State.CLAIMED):
            assert row.paid
    assert diagram().count("\n") == len(TRANSITIONS) + 1


def test_state_numbers_never_change() -> None:
    assert [(s.name, s.value) for s in State] == [
        ("PROPOSED", 1),
        ("DECLINED", 2),
        ("AGREED", 3),
        ("RUNNING", 4),
        ("PROVED", 5),
        ("CHECKING", 6),
        ("SETTLING", 7),
        ("SETTLED", 8),
        ("SLASHED", 9),
        ("CLAIMING", 10),
        ("CLAIMED", 11),
        ("DISPUTED", 12),
    ]


def test_a_network_file_reads_back_to_the_same_id() -> None:
    network = Network("lan", Rules(audit_permille=1000), (Deposit(PEER, 5, 6),), ("/ip4/127.0.0.1/tcp/1",))
    again = load(dump(network))
    assert again == network
    assert again.id == network.id
    assert load(dump(Network("lan", Rules(), (Deposit(PEER, 5, 6),)))).id != network.id


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name = ", "not TOML"),
        ("", "does not fit"),
        ('name = "x"\nwhat = 1', "unknown keys"),
        ('name = "x"\n[rules]\nnope = 1', "unknown rules"),
        ('name = "x"\n[rules]\nround_ms = 0', "does not fit"),
        ('name = "x"\n[rules]\nround_ms = "1"', "does not fit"),
        ('name = "x"\ndeposits = 3', "does not fit"),
        ('name = "x"\nrules = 3', "not a table"),
        (f'name = "x"\n[[deposits]]\npeer = "{PEER}"\nfree_micro = -1', "does not fit"),
        (f'name = "x"\n[[deposits]]\npeer = "{PEER}"\n[[deposits]]\npeer = "{PEER}"', "two deposits"),
        ('name = "x"\n[rules]\nlock_margin_permille = 1000', "lets a cheat win"),
        ('name = "x"\n[rules]\nnewcomer_permille = 40', "below check_permille"),
        ('name = "x"\n[rules]\njackpot_permille = 900', "signing what it did not check"),
        ('name = "x"\n[rules]\npool_permille = 40', "does not fill the pool"),
        ('name = "x"\n[rules]\ncheck_permille = 2', "more of an honest solver than it earns"),
    ],
)
def test_a_bad_network_file_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises((BadNetworkFile, RemoteProtocolError), match=complaint):
        load(text)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 50), st.integers(1, 60), st.integers(1, 1000))
def test_drawn_segments_are_in_range_distinct_and_enough(random: bytes, first: int, count: int, permille: int) -> None:
    drawn = select_segments(random, first=first, last=first + count, permille=permille, minimum=2)
    assert drawn == tuple(sorted(set(drawn)))
    assert all(first <= segment < first + count for segment in drawn)
    assert len(drawn) == min(count, max(2, -(-count * permille // 1000)))


def test_the_draw_is_fair_and_moves_with_every_seed() -> None:
    counts = [0] * 10
    for i in range(2000):
        r = randomness(proof=blake("p", i.to_bytes(4, "big")), submitter_seed=b"a" * 32, solver_seed=b"b" * 32)
        for segment in select_segments(r, first=0, last=10, permille=200, minimum=2):
            counts[segment] += 1
    assert all(330 < count < 470 for count in counts), counts  # mean 400, five standard deviations
    base = {"proof": b"p", "submitter_seed": b"a", "solver_seed": b"b"}
    assert (
        len({randomness(**base), randomness(**{**base, "solver_seed": b""}), randomness(**{**base, "proof": b"q"})})
        == 3
    )  # type: ignore[arg-type]


def test_the_order_of_candidates_does_not_matter_to_the_draw() -> None:
    candidates = [bytes([i]) * 32 for i in range(9)]
    drawn = draw(b"r" * 32, b"verifier", candidates)
    assert drawn == draw(b"r" * 32, b"verifier", candidates[::-1])
    assert sorted(drawn) == candidates


def test_a_seed_chosen_after_the_commitment_is_refused() -> None:
    committed = commitment(b"s" * 32, agreement_salt=b"alice")
    check_reveal(b"s" * 32, committed, agreement_salt=b"alice")
    with pytest.raises(VerificationFailed):
        check_reveal(b"t" * 32, committed, agreement_salt=b"alice")
    with pytest.raises(VerificationFailed):  # copied from another party
        check_reveal(b"s" * 32, committed, agreement_salt=b"bob")


@given(st.integers(1, 500), st.integers(0, 100), st.integers(1, 10**9), st.integers(0, 10**9))
def test_the_learning_rate_stays_between_floor_and_peak(steps: int, warmup: int, peak: int, floor: int) -> None:
    floor, warmup = min(floor, peak), min(warmup, steps)
    schedule = Schedule("warmup-cosine", peak, floor, warmup)
    rates = [learning_rate(schedule, step=i, steps=steps) for i in range(steps)]
    assert all(0 <= rate <= peak for rate in rates)
    after = rates[warmup:]
    assert all(floor <= rate for rate in after)
    assert after == sorted(after, reverse=True)
    assert rates[:warmup] == sorted(rates[:warmup])


def test_a_task_that_does_not_add_up_is_refused() -> None:
    network = Network("t", Rules(), ())
    task = make_task(network)
    import msgspec

    from protocol.codec import encode

    assert TaskSpec.from_bytes(encode(task), network=network.id) == task
    wrong_size = msgspec.structs.replace(task, arrays=(msgspec.structs.replace(task.arrays[0], size_bytes=7),))
    too_many = msgspec.structs.replace(task, steps=10**6, steps_per_segment=1)
    too_long = msgspec.structs.replace(task, batch=msgspec.structs.replace(task.batch, length=1000))
    for bad in (wrong_size, too_many, too_long):
        with pytest.raises(RemoteProtocolError):
            TaskSpec.from_bytes(encode(bad), network=network.id)


def test_the_page_of_the_protocol_names_every_rule_with_its_default() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", page[page.index("| rule | default |") :], re.MULTILINE)
    assert rows == [(f.name, str(f.default)) for f in msgspec.structs.fields(Rules)]
