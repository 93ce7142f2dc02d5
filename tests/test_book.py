"""The address book and the standing of peers: bounded, fair, and hard to push around."""

from __future__ import annotations

import pytest

from peer.addresses import Address
from peer.book import AddressBook
from peer.lan import MEMBERS_MAX
from peer.standing import Rates, Standing
from protocol import params

OWN, PEER, OTHER = b"o" * 32, b"p" * 32, b"q" * 32


def place(peer: bytes, port: int = 1) -> Address:
    return Address("ip4", "192.0.2.1", port, peer)


def stranger(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_a_lost_peer_is_tried_again_with_growing_pauses_and_never_given_up() -> None:
    book, now = AddressBook(OWN), 0.0
    book.learn(place(PEER), now=now, kept=True)
    pauses = []
    for _ in range(30):
        assert book.due(now=now, linked=[]) == [PEER]
        book.failed(PEER, now=now)
        start = now
        while not book.due(now=now, linked=[]):
            now += 0.5
        pauses.append(now - start)
    assert pauses == sorted(pauses) and pauses[0] < 5 and pauses[-1] == params.REDIAL_SECONDS_MAX
    book.reached(place(PEER), now=now)
    assert book.due(now=now + params.REDIAL_SECONDS_MIN, linked=[]) == [PEER]
    assert book.due(now=now + 100, linked=[PEER]) == []


def test_hearsay_is_tried_only_while_links_are_wanted_and_then_forgotten() -> None:
    book = AddressBook(OWN)
    book.learn(place(PEER), now=0.0, wait=2.0)
    assert book.due(now=1.0, linked=[]) == [] and book.due(now=2.0, linked=[]) == [PEER]
    assert book.due(now=2.0, linked=[stranger(n) for n in range(params.LINKS_WANTED)]) == []
    for _ in range(params.REDIALS_MAX):
        book.failed(PEER, now=3.0)
    assert book.known(PEER) == [] and len(book) == 0


def test_hearsay_never_pushes_out_what_was_asked_for() -> None:
    book = AddressBook(OWN)
    book.learn(place(PEER), now=0.0, kept=True)
    for number in range(2 * params.KNOWN_PEERS_MAX):
        book.learn(place(stranger(number)), now=0.0)
    assert len(book) == params.KNOWN_PEERS_MAX and book.known(PEER) == [place(PEER)]
    for port in range(2, 100):
        book.learn(place(PEER, port), now=0.0)
    assert len(book.known(PEER)) == params.KNOWN_ADDRESSES_PER_PEER_MAX and book.known(PEER)[0] == place(PEER)


def test_this_peer_itself_is_never_entered() -> None:
    book = AddressBook(OWN)
    book.learn(place(OWN), now=0.0, kept=True)
    book.learn(Address("ip4", "192.0.2.1", 1), now=0.0)
    assert len(book) == 0


def test_an_address_where_somebody_else_answers_is_forgotten() -> None:
    book = AddressBook(OWN)
    book.learn(place(PEER, 1), now=0.0, kept=True)
    book.learn(place(PEER, 2), now=0.0)
    book.forget(place(PEER, 1))
    assert book.known(PEER) == [place(PEER, 2)]
    book.forget(place(PEER, 2))
    assert book.known(PEER) == []


def test_a_newcomer_is_told_of_linked_peers_only_and_not_endlessly() -> None:
    book = AddressBook(OWN)
    for number in range(2 * params.PEERS_TOLD_MAX):
        book.learn(place(stranger(number)), now=0.0)
    book.learn(place(PEER), now=0.0)
    assert book.told([PEER, OTHER]) == [str(place(PEER))]
    assert len(book.told([stranger(n) for n in range(2 * params.PEERS_TOLD_MAX)])) == params.PEERS_TOLD_MAX


def test_penalties_close_together_ban_and_spread_ones_do_not() -> None:
    standing = Standing()
    for number in range(params.PENALTIES_MAX - 1):
        assert not standing.penalise(PEER, "malformed", now=float(number))
    assert standing.penalise(PEER, "malformed", now=10.0)
    assert standing.banned(PEER, now=10.0) and standing.bans(now=10.0) == 1
    assert not standing.banned(PEER, now=11.0 + params.BAN_SECONDS)
    for number in range(10 * params.PENALTIES_MAX):
        assert not standing.penalise(OTHER, "malformed", now=60.0 * number)
    assert standing.reasons["malformed"] == 11 * params.PENALTIES_MAX


def test_standings_are_bounded() -> None:
    standing = Standing()
    for number in range(params.STANDINGS_MAX + 10):
        standing.penalise(stranger(number), "x", now=0.0)
    assert len(standing._records) == params.STANDINGS_MAX


@pytest.mark.parametrize("per_second", [1, 200])
def test_a_rate_allows_its_burst_and_then_its_rate(per_second: int) -> None:
    rates = Rates(per_second)
    assert sum(rates.take(PEER, now=0.0) for _ in range(10 * per_second)) == 2 * per_second
    assert sum(rates.take(PEER, now=1.0) for _ in range(10 * per_second)) == per_second
    assert rates.take(OTHER, now=1.0), "one key's excess is not another's"


def test_rates_are_bounded_in_keys() -> None:
    rates = Rates(1, keys_max=10)
    for number in range(100):
        rates.take(stranger(number), now=0.0)
    assert len(rates._buckets) == 10


def test_a_swarm_on_one_machine_can_see_all_of_itself() -> None:
    assert params.LINKS_WANTED >= MEMBERS_MAX - 1
