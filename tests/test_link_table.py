"""Reports of links: who boasts is held to the other end's word, what is old or forged does not count."""

from __future__ import annotations

import pytest

from market.link_table import LinkTable, LinkWord
from market.placement import Devices, Links
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.link_report import LinkReport, MeasuredLink

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
    assert Devices() is not None
    assert [(one, other, word.said) for one, other, word in table.links()] == [(A, B, 1)]
