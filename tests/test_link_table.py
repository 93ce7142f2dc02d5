"""Reports of links: who boasts is held to the other end's word, what is old or forged does not count."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from market.ledger import Ledger
from market.link_table import LinkTable, LinkWord
from market.placement import Links
from peer.cli_links import _arrays
from peer.desk import Desk, Means
from peer.events import GossipIn, PeerUp, Penalise, Publish, Tick
from peer.link_file import read_links
from peer.link_reports import LinkReports
from peer.node import Node
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.link_report import LinkReport, LinkTimed, MeasuredLink
from protocol.network import Network, Rules
from protocol.records import open_record, seal

NETWORK, NOW = b"n" * 32, 10**18
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def report(
    peer: bytes, *links: tuple[bytes, int, int], sequence: int = 1, created_ns: int = NOW, life_ns: int = 10**11
) -> LinkReport:
    return LinkReport(
        network=NETWORK, peer=peer, sequence=sequence, links=tuple(MeasuredLink(*link) for link in links),
        created_ns=created_ns, expires_ns=created_ns + life_ns,
    )  # fmt: skip


def test_the_slower_word_counts_whoever_says_it() -> None:
    table = LinkTable()
    assert table.take(report(A, (B, 1_000, 10**9)), now_ns=NOW)
    assert table.link(A, B) == table.link(B, A) == LinkWord(1_000, 10**9, 1, True)
    assert table.take(report(B, (A, 30_000, 10**6)), now_ns=NOW)
    assert table.link(A, B) == table.link(B, A) == LinkWord(30_000, 10**6, 2, True)
    assert table.take(report(A, (B, 1, 10**11), sequence=2), now_ns=NOW), "boasting"
    assert table.link(A, B) == LinkWord(30_000, 10**6, 2, True)
    assert table.take(report(B, (A, 40_000, 0), sequence=2), now_ns=NOW), "one end that moved nothing lately"
    assert table.link(A, B) == LinkWord(40_000, 10**11, 2, True)


def test_only_news_of_now_counts() -> None:
    table = LinkTable()
    assert table.take(report(A, (B, 5, 5), sequence=7), now_ns=NOW)
    assert not table.take(report(A, (B, 9, 9), sequence=7), now_ns=NOW)
    assert not table.take(report(C, (B, 9, 9), created_ns=NOW - 10**12), now_ns=NOW)
    table.expire(now_ns=NOW + 10**11)
    assert len(table) == 0
    guess = LinkWord(params.LINK_DELAY_GUESS_US, params.LINK_BYTES_PER_SECOND, 0, False)
    assert table.link(A, B) == guess


@pytest.mark.parametrize(
    "wrong",
    [
        report(A, (A, 1, 1)),
        report(A, (B, 1, 1), (B, 1, 1)),
        report(A, (C, 1, 1), (B, 1, 1)),
        report(A, created_ns=NOW + params.CLOCK_SKEW_NS_MAX + 1),
        report(A, life_ns=params.LINK_REPORT_LIFETIME_NS + 1),
        report(A, life_ns=0),
    ],
)
def test_a_report_that_cannot_be_is_refused(wrong: LinkReport) -> None:
    table = LinkTable()
    with pytest.raises(VerificationFailed):
        table.take(wrong, now_ns=NOW)
    assert len(table) == 0


def test_a_report_is_bounded_and_fits_a_bundle_of_gossip() -> None:
    many = [(number.to_bytes(32, "big"), 1, 1) for number in range(params.LINKS_REPORTED_MAX)]
    whole = encode(report(A, *many))
    assert len(whole) < params.GOSSIP_RECORD_BYTES_MAX // 8
    assert decode(LinkReport, whole, bytes_max=params.GOSSIP_RECORD_BYTES_MAX) == report(A, *many)
    for wrong in (report(A, *many, (B, 1, 1)), report(A, (B, -1, 1)), report(A, (B, 1, params.LINK_SPEED_MAX + 1))):
        with pytest.raises(MalformedRecord):
            decode(LinkReport, encode(wrong), bytes_max=params.GOSSIP_RECORD_BYTES_MAX)


def test_the_table_is_bounded_and_what_expires_first_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "LINK_REPORTS_MAX", 2)
    table = LinkTable()
    for peer, life_ns in ((A, 10**11), (B, 10**10), (C, 10**11)):
        table.take(report(peer, (b"z" * 32, 7, 7), life_ns=life_ns), now_ns=NOW)
    assert len(table) == 2
    assert table.link(B, b"z" * 32).said == 0
    assert table.link(A, b"z" * 32).said == 1


def test_placement_takes_the_matrices() -> None:
    table = LinkTable()
    table.take(report(A, (B, 30_000, 125_000_000)), now_ns=NOW)
    found = table.matrices([A, B, C])
    assert found.delay_ms.tolist() == [[0, 30, 50], [30, 0, 50], [50, 50, 0]]
    assert found.gbps[0, 1] == found.gbps[1, 0] == 1.0
    assert found.gbps[0, 2] == params.LINK_BYTES_PER_SECOND * 8 / 1e9
    assert found.known[0].tolist() == [2, 1, 0]
    assert Links(found.delay_ms, found.gbps) is not None
    assert [(one, other, word.said) for one, other, word in table.links()] == [(A, B, 1)]


def desk_of(seed: bytes) -> Desk:
    network, key = Network("links", Rules(), ()), SigningKey.from_seed(seed)
    return Desk(key=key, network=network, rng=random.Random(1), ledger=Ledger(), means=Means(), now_ns=NOW)


def test_what_one_peer_measured_is_what_another_is_told() -> None:
    one, two = LinkReports(desk_of(b"1" * 32)), LinkReports(desk_of(b"2" * 32))
    one.tick()
    assert one.desk.outbox == {}, "nothing measured, nothing said"
    other = two.desk.me
    one.desk.peers[other] = NOW
    for round_trip_us in (40_000, 90_000, 44_000):
        one.timed(LinkTimed(other, round_trip_us))
    one.desk.measured(other, 5_000_000)
    one.desk.now_ns += params.LINK_REPORT_NS
    one.tick()
    ((envelope,),) = one.desk.outbox.values()
    report_, _, signers = open_record(envelope, network=one.desk.network.id)
    assert isinstance(report_, LinkReport)
    assert signers == {one.desk.me}
    two.desk.now_ns = one.desk.now_ns
    two.take(report_, envelope)
    assert two.table.envelopes([other, one.desk.me]) == [envelope], "as it was signed, for an audit"
    word = two.table.link(one.desk.me, other)
    assert (word.bytes_per_second, word.said) == (5_000_000, 1)
    assert 20_000 <= word.delay_us < 24_000, "one that waited in a queue counts for little"
    (row,) = two.describe({})["links"]
    assert {row["one"], row["other"]} == {peer_name(one.desk.me), peer_name(other)}
    one.tick()
    assert len(one.desk.outbox["market"]) == 1, "once a minute"


def test_the_file_for_a_plan_reads_back(tmp_path: Path) -> None:
    one, two, three = (peer_name(SigningKey.from_seed(bytes([number]) * 32).public) for number in (1, 2, 3))
    link = {"one": one, "other": two, "delay_us": 30_000, "bytes_per_second": 125_000_000, "said": 2}
    path = tmp_path / "links.npz"
    path.write_bytes(_arrays({"me": three, "links": [link]}))
    links, _ = read_links(path, memory_needed_gb=0, seconds_per_credit=0, recovery_s=0)
    names = sorted((one, two, three))
    assert links.delay_ms[names.index(one)][names.index(two)] == 30
    assert links.gbps[names.index(two)][names.index(one)] == 1
    assert links.delay_ms[names.index(three)][names.index(one)] == params.LINK_DELAY_GUESS_US / 1000


def test_a_node_tells_its_links_to_all_and_penalises_a_report_that_cannot_be() -> None:
    network = Network("links", Rules(), ())
    keys = [SigningKey.from_seed(bytes([number]) * 32) for number in (1, 2)]
    one, two = (
        Node(
            key=key, network=network, rng=random.Random(1), means=Means(), ledger=Ledger(), rows=lambda *_: [],
            now_ns=NOW,
        )
        for key in keys
    )
    one.handle(PeerUp(keys[1].public, ()), NOW)
    one.handle(LinkTimed(keys[1].public, 10_000), NOW)
    told = one.handle(Tick(), NOW + 1)
    (published,) = [effect for effect in told if isinstance(effect, Publish)]
    two.handle(GossipIn("market", keys[0].public, published.data), NOW + params.LINK_REPORT_NS + 2)
    assert two.commands.links.table.link(keys[0].public, keys[1].public).delay_us == 5_000
    forged = report(keys[0].public, (keys[0].public, 1, 1))
    sealed = seal(msgspec.structs.replace(forged, network=network.id), keys[0])
    effects = two.handle(GossipIn("market", keys[0].public, encode([sealed])), NOW + params.LINK_REPORT_NS + 3)
    assert [effect.peer for effect in effects if isinstance(effect, Penalise)] == [keys[0].public]


def test_the_matrices_say_of_each_pair_what_the_table_says() -> None:
    rng, table = random.Random(7), LinkTable()
    peers = [bytes([number]) * 32 for number in range(1, 9)]
    for peer in peers[:6]:
        others = sorted(rng.sample([other for other in peers if other != peer], 4))
        links = [(other, rng.randrange(10**5), rng.choice([0, 10**5, 10**9])) for other in others]
        assert table.take(report(peer, *links), now_ns=NOW)
    rows = [*peers, peers[0], peers[7]]  # who has two units stands there twice
    made = table.matrices(rows)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            word = table.link(one, other) if i != j else LinkWord(0, params.LINK_SPEED_MAX, 2, True)
            found = (made.delay_ms[i, j], made.gbps[i, j], made.known[i, j])
            assert found == (word.delay_us / 1000, word.bytes_per_second * 8 / 1e9, word.said)
