"""Who is at fault where the two ends of a link differ, by what each signed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peer.run_events import LinkEnds
from peer.units import Complaint, Delivered, faults_of
from protocol.codec import blake
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.handover import Handover, check_handover, hand_over, open_handover
from protocol.keys import SigningKey
from protocol.stage import Codec, Link, Stage, links_in, links_out

NETWORK, RUN = bytes(32), blake("run")
KEYS = [SigningKey.from_seed(bytes([i]) * 32) for i in range(2)]
PEERS = [key.public for key in KEYS]
RAW = Codec("float32")
STAGES = [
    Stage(
        run=RUN, stage=stage, stages=2, replica=0, replicas=1, micro_batches=1, forward=RAW, backward=RAW, sync="none",
        shared=RAW,
    )
    for stage in range(2)
]  # fmt: skip


def row(sender: int, receiver: int) -> bytes:
    return blake("sent", bytes([sender, receiver]))


def signed(sender: int, receiver: int, root: bytes, *, segment: int = 3, key: int | None = None) -> bytes:
    flow = "forward" if sender < receiver else "backward"
    link = Link(flow, receiver)  # type: ignore[arg-type]
    handover = Handover(network=NETWORK, run=RUN, unit=sender, link=link, segment=segment, root=root)
    return hand_over(handover, KEYS[sender if key is None else key])


def honest() -> dict[int, Delivered]:
    found = {}
    for unit, other in ((0, 1), (1, 0)):
        assert [link.other for link in (*links_out(STAGES[unit]), *links_in(STAGES[unit]))] == [other, other]
        ends = LinkEnds(row(unit, other), row(other, unit), bytes(32))
        found[unit] = Delivered(bytes(32), bytes(32), ends, (signed(other, unit, row(other, unit)),))
    return found


def faults(here: dict[int, Delivered], **more: Any) -> dict[int, str]:
    found, left = faults_of(here, STAGES, PEERS, network=NETWORK, run=RUN, segment=3, **more)
    assert not left
    return found


def test_ends_that_agree_have_no_fault() -> None:
    assert faults(honest()) == {}


def test_who_signed_one_thing_and_claims_another_is_at_fault() -> None:
    here = honest()
    here[0] = replace(here[0], ends=replace(here[0].ends, sent=blake("other")))
    assert list(faults(here)) == [0]


@pytest.mark.parametrize(
    "shown",
    [
        (),
        (b"",),
        (signed(0, 1, row(0, 1)),),  # of what was sent, not of what it claims
        (signed(0, 1, blake("made up"), key=1),),  # by itself
        (signed(0, 1, blake("made up"), segment=2),),  # of another segment
    ],
)
def test_who_claims_what_its_neighbour_did_not_sign_is_at_fault(shown: tuple[bytes, ...]) -> None:
    here = honest()
    here[1] = replace(here[1], ends=replace(here[1].ends, received=blake("made up")), handovers=shown)
    assert list(faults(here)) == [1]


def test_what_an_earlier_holder_of_a_unit_signed_is_the_fault_of_nobody_who_is_there_now() -> None:
    before = SigningKey.from_seed(b"b" * 32)
    here, root = honest(), blake("what it sent before it went")
    handover = Handover(network=NETWORK, run=RUN, unit=0, link=Link("forward", 1), segment=3, root=root)
    shown = (hand_over(handover, before),)
    here[1] = replace(here[1], ends=replace(here[1].ends, received=root), handovers=shown)
    holders = [{PEERS[0], before.public}, {PEERS[1]}]
    found = faults_of(here, STAGES, PEERS, network=NETWORK, run=RUN, segment=3, before=holders)
    assert found == ({}, {1: Complaint(0, before.public, "differs")})
    assert list(faults(here, before=[{PEERS[0]}, {PEERS[1]}])) == [1], "of a stranger it is worth nothing"


def test_a_handover_is_believed_only_whole() -> None:
    data = signed(0, 1, row(0, 1))
    handover, peer = open_handover(data, network=NETWORK)
    assert peer == PEERS[0]
    check_handover(data, handover, PEERS[0])
    for place in range(0, len(data), 7):
        with pytest.raises(RemoteProtocolError):
            open_handover(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], network=NETWORK)
    with pytest.raises(VerificationFailed):
        check_handover(data, handover, PEERS[1])
    with pytest.raises(RemoteProtocolError):
        open_handover(data, network=blake("another network"))
