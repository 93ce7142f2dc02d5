"""What a unit of a run believes its neighbours signed, and how long it keeps that."""

from __future__ import annotations

import random

import pytest

from market.ledger import Ledger
from peer.desk import Desk, Means
from peer.run_events import LinkEnds
from peer.run_messages import HandoverGiven
from peer.units import Complaint, Units
from protocol import params
from protocol.codec import blake, encode
from protocol.network import Network, Rules
from tests.swarm_scenario import make_task
from tests.test_handover import KEYS, NETWORK, PEERS, STAGES, row, signed

WORK = blake("work")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Units:
    """Of the peer that runs unit 1, beside unit 0."""
    network = Network("n", Rules(), ())
    monkeypatch.setattr(Network, "id", NETWORK)
    found = Units(Desk(KEYS[1], network, random.Random(0), Ledger(), Means()))
    assert found.seat(WORK, STAGES[1], 1, list(PEERS), [1, 1])
    return found


def ends(segment: int) -> LinkEnds:
    return LinkEnds(row(1, 0), blake("sent", bytes([segment])), bytes(32))


def give(units: Units, segment: int, root: bytes) -> None:
    units.on_given(PEERS[0], HandoverGiven((signed(0, 1, root, segment=segment),)))


def test_a_handover_that_was_right_stays_though_its_signer_signs_another(units: Units) -> None:
    units.ended(WORK, 0, ends(0))
    give(units, 0, ends(0).received)
    kept = units.handovers(WORK, 0)
    assert kept
    give(units, 0, blake("other"))
    assert units.handovers(WORK, 0) == kept, "it holds a signature for all that it received"
    assert not units.disputed


def test_a_handover_that_was_wrong_gives_way_to_a_right_one(units: Units) -> None:
    units.ended(WORK, 0, ends(0))
    give(units, 0, blake("other"))
    assert units.handovers(WORK, 0) is None
    assert units.disputed == {(WORK, 0): Complaint(0, PEERS[0], "differs")}
    give(units, 0, ends(0).received)
    assert units.handovers(WORK, 0) and not units.disputed


def test_handovers_are_kept_until_receipts_are_signed_and_not_much_longer(units: Units) -> None:
    task, count = encode(make_task(units.desk.network, segments=99)), 4 * params.HANDOVERS_KEPT
    for segment in range(count):  # its submitter is away
        give(units, segment, ends(segment).received)
        units.ended(WORK, segment, ends(segment))
    for segment in range(count):
        assert units.handovers(WORK, segment), "its receipt may be handed in yet"
        units.settled(WORK, task, segment)
        assert len(units.given) == len(units.handed) <= count - segment + params.HANDOVERS_KEPT
    for segment in range(count - params.HANDOVERS_KEPT):
        give(units, segment, blake("made up later"))
    assert len(units.given) == params.HANDOVERS_KEPT and not units.disputed
