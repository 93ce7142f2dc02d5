"""The bench card: what is right passes in O(n^2), and each lie about work, time, memory or identity is refused."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.matching import Proven, believed_ns
from protocol import params
from protocol.bench_card import (
    LARGEST,
    PRIME,
    balanced,
    base_matrix,
    card_file,
    chain_operations,
    chain_size,
    check_card_file,
    check_opening,
    check_work,
    open_card,
    reference_result,
    row_orders,
    work_seed,
)
from protocol.codec import encode
from protocol.errors import LimitExceeded, MalformedRecord, RemoteProtocolError, VerificationFailed, WrongNetwork
from protocol.philox import words
from tests.bench_scene import (
    CHALLENGER,
    EVE,
    NETWORK,
    NOW,
    PROVER,
    SECOND,
    card,
    challenge,
    challenge_id,
    honest,
    witnessed,
)
from worker.bench import BACKENDS, Memory, chain_result
from worker.exact import compiled
from worker.exact.products import int8_is_exact

LATER = NOW + 10 * SECOND


def randbytes(seed: int = 0) -> Any:
    return random.Random(seed).randbytes


def check(envelope: bytes, evidence: bytes, now_ns: int = LATER) -> Any:
    return check_card_file(card_file(envelope, evidence), network=NETWORK, now_ns=now_ns, randbytes=randbytes())


# --- the work ----------------------------------------------------------------------------------------------
def test_an_honest_card_passes_and_says_what_was_measured() -> None:
    terms, evidence, envelope = honest()
    opened = check(envelope, evidence)
    assert opened.grade == "witnessed"
    assert opened.operations_per_second == chain_operations(terms.side, terms.links) // 2
    assert opened.proven_memory_bytes == 8 * params.BENCH_MEMORY_BLOCK_BYTES


HERE = {"float32": True, "int8": int8_is_exact(), "int16": compiled.has_products()}


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if HERE[backend]])
def test_every_fast_way_gives_the_bytes_of_plain_integers(backend: str) -> None:
    terms = challenge(links=5)
    assert chain_result(bytes(32), 256, 5, backend=backend) == reference_result(terms, bytes(32))


def test_a_side_above_one_exact_sum_is_cut_and_still_right() -> None:
    terms = challenge(side=2048, links=1)
    evidence = chain_result(bytes(32), 2048, 1, backend="float32")
    check_work(terms, bytes(32), evidence, randbytes=randbytes())
    base = base_matrix(work_seed(bytes(32)), 2048).astype(np.int64)
    row = (base[5] @ base[next(row_orders(work_seed(bytes(32)), 2048, 1))[1]] + LARGEST) % PRIME - LARGEST
    assert np.array_equal(np.frombuffer(evidence, np.int8).reshape(2, 2048, 2048)[1, 5], row)
    if HERE["int16"]:
        assert chain_result(bytes(32), 2048, 1, backend="int16") == evidence


def test_every_single_wrong_element_tried_is_caught() -> None:
    """A wrong element e at (i, j) passes a vector v only where e * v_i is 0 modulo 251, with probability 1/251."""
    terms, evidence, _ = honest()
    rng = random.Random(1)
    for attempt in range(40):
        wrong = bytearray(evidence)
        place = rng.randrange(len(wrong))
        value = rng.choice([v for v in range(-LARGEST, LARGEST + 1) if v % 256 != wrong[place]])
        wrong[place] = value % 256
        with pytest.raises(VerificationFailed, match="Freivalds"):
            check_work(terms, challenge_id(terms), bytes(wrong), randbytes=randbytes(attempt))


def test_a_wrong_element_passes_vectors_that_its_maker_knew() -> None:
    """Why the checker draws the vectors after it has the evidence: with a zero there, the lie cannot be seen."""
    terms, evidence, _ = honest()
    wrong = bytearray(evidence)
    wrong[0] = (wrong[0] + 1) % 100  # row 0
    middle = (LARGEST).to_bytes(8, "little")  # the bytes that mean 0

    def known(count: int) -> bytes:
        vectors = np.frombuffer(randbytes(3)(count), dtype="<u8").reshape(4, 256).copy()
        vectors[:, 0] = int.from_bytes(middle, "little")
        return vectors.tobytes()

    check_work(terms, challenge_id(terms), bytes(wrong), randbytes=known)
    with pytest.raises(VerificationFailed):
        check_work(terms, challenge_id(terms), bytes(wrong), randbytes=randbytes())


def test_the_orders_are_stable_orders_of_the_generators_words() -> None:
    orders = list(row_orders(5, 256, 20))
    assert len(orders) == 20
    for link in (0, 15, 16, 19):
        drawn = words(5, link // 16, 1, 16 * 2 * 256).reshape(16, 2, 256)[link % 16]
        assert np.array_equal(orders[link], np.argsort(drawn, axis=1, kind="stable"))


def test_a_chain_that_leaves_out_a_link_is_caught() -> None:
    terms = challenge()
    shorter = reference_result(challenge(links=2), challenge_id(terms))
    with pytest.raises(VerificationFailed, match="Freivalds"):
        check_work(terms, challenge_id(terms), shorter, randbytes=randbytes())


@pytest.mark.parametrize("changed", [{"peer": EVE.public}, {"nonce": b"\1" * 32}, {"challenger": EVE.public}])
def test_work_done_for_another_key_or_moment_is_worthless(changed: dict[str, Any]) -> None:
    terms, evidence, _ = honest()
    other = challenge(**changed)
    key = EVE if "challenger" in changed else CHALLENGER
    with pytest.raises(VerificationFailed, match="another peer or challenge"):
        check_work(other, challenge_id(other, key), evidence, randbytes=randbytes())
    assert terms.side == other.side


def test_evidence_of_another_size_or_with_two_names_for_one_residue_is_refused() -> None:
    terms, evidence, _ = honest()
    for wrong in (b"", evidence[:-1], evidence + b"\0"):
        with pytest.raises(MalformedRecord, match="side 256"):
            check_work(terms, challenge_id(terms), wrong, randbytes=randbytes())
    with pytest.raises(MalformedRecord, match="outside"):
        check_work(terms, challenge_id(terms), b"\x7e" + evidence[1:], randbytes=randbytes())


def test_a_chain_too_long_to_check_is_refused_before_it_is_checked() -> None:
    with pytest.raises(LimitExceeded):
        check_work(challenge(side=4096, links=4096), bytes(32), b"", randbytes=randbytes())


@given(st.lists(st.integers(-(2**24) + 1, 2**24 - 1), min_size=1, max_size=50))
def test_balanced_is_the_residue_next_to_zero(values: list[int]) -> None:
    got = balanced(np.array(values, dtype=np.float32))
    assert got.tolist() == [(v + LARGEST) % PRIME - LARGEST for v in values]


@given(st.integers(1, 10**16))
def test_a_chain_is_sized_within_its_limits_and_not_beyond_its_time(speed: int) -> None:
    side, links = chain_size(speed)
    assert chain_operations(side, links) <= params.BENCH_OPERATIONS_MAX
    assert links == 1 or chain_operations(side, links) * 10**9 <= speed * params.BENCH_TARGET_NS


# --- the card ----------------------------------------------------------------------------------------------
def test_a_card_altered_in_any_figure_loses_its_signatures() -> None:
    terms, evidence, envelope = honest()
    true = card(terms, evidence)
    for figure in ("elapsed_ns", "memory_bytes", "float32_per_second", "disk_bytes", "cores", "expires_ns"):
        altered = encode(card(terms, evidence, **{figure: getattr(true, figure) + 1}))
        forged = envelope.replace(encode(true), altered)
        assert forged != envelope
        with pytest.raises(VerificationFailed):
            check(forged, evidence)


def test_a_card_needs_the_signature_of_who_timed_it() -> None:
    terms, evidence, _ = honest()
    with pytest.raises(VerificationFailed, match="signatures"):
        check(witnessed(card(terms, evidence), PROVER), evidence)
    with pytest.raises(VerificationFailed, match="no party"):
        check(witnessed(card(terms, evidence), PROVER, EVE), evidence)


def test_a_challenge_that_its_challenger_did_not_sign_is_none() -> None:
    terms, evidence, _ = honest()
    with pytest.raises(VerificationFailed):
        check(witnessed(card(terms, evidence, key=PROVER)), evidence)


def test_another_peers_card_cannot_be_worn() -> None:
    """Eve answers with the challenge, and the evidence, of the prover."""
    terms, evidence, _ = honest()
    with pytest.raises(VerificationFailed, match="another peer"):
        check(witnessed(card(terms, evidence, peer=EVE.public), EVE, CHALLENGER), evidence)


def test_other_evidence_than_the_cards_is_refused() -> None:
    terms, _, envelope = honest()
    other = reference_result(challenge(links=1), challenge_id(terms))
    with pytest.raises(VerificationFailed, match="the one its card names"):
        check(envelope, other)


def test_a_time_beyond_the_window_is_refused() -> None:
    terms, evidence, _ = honest()
    late = witnessed(card(terms, evidence, elapsed_ns=terms.window_ns + 1))
    with pytest.raises(VerificationFailed, match="window"):
        check(late, evidence)


def test_an_expired_a_future_and_an_everlasting_card_are_refused() -> None:
    terms, evidence, envelope = honest()
    with pytest.raises(VerificationFailed, match="expired"):
        check(envelope, evidence, now_ns=NOW + 3600 * SECOND)
    with pytest.raises(VerificationFailed, match="future"):
        check(envelope, evidence, now_ns=NOW - params.CLOCK_SKEW_NS_MAX)
    forever = NOW + 3 * SECOND + params.BENCH_CARD_LIFETIME_NS + 1
    with pytest.raises(MalformedRecord, match="lives longer"):
        check(witnessed(card(terms, evidence, expires_ns=forever)), evidence)


def test_a_card_of_another_network_is_refused() -> None:
    _, evidence, envelope = honest()
    data = card_file(envelope, evidence)
    with pytest.raises(WrongNetwork):
        check_card_file(data, network=bytes(32), now_ns=LATER, randbytes=randbytes())


def test_a_self_made_card_says_so_and_proves_no_memory() -> None:
    terms = challenge(challenger=PROVER.public)
    evidence = reference_result(terms, challenge_id(terms, PROVER))
    opened = check(witnessed(card(terms, evidence, key=PROVER), PROVER), evidence)
    assert (opened.grade, opened.proven_memory_bytes) == ("self-timed", 0)


def test_a_device_name_that_would_write_to_the_readers_terminal_is_no_record() -> None:
    terms, evidence, _ = honest()
    for name in ("\x1b[2Jclean", "two\n", "\u202e"):
        with pytest.raises(MalformedRecord):
            check(witnessed(card(terms, evidence, device=name)), evidence)


def test_an_oversize_file_is_refused_before_it_is_read() -> None:
    with pytest.raises(LimitExceeded):
        check_card_file(bytes(params.BENCH_FILE_BYTES_MAX + 1), network=NETWORK, now_ns=LATER, randbytes=randbytes())


HONEST = honest()


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_our_errors(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        check_card_file(data, network=NETWORK, now_ns=LATER, randbytes=randbytes())
    with pytest.raises(RemoteProtocolError):
        open_card(data, network=NETWORK, now_ns=LATER)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4), st.sampled_from(["flip", "cut", "insert"]))
def test_a_damaged_card_is_refused(at: int, noise: bytes, how: str) -> None:
    data = HONEST[2]
    at %= len(data)
    damaged = {
        "flip": data[:at] + bytes([data[at] ^ noise[0]]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + noise + data[at:],
    }[how]
    if damaged != data:
        with pytest.raises(RemoteProtocolError):
            open_card(damaged, network=NETWORK, now_ns=LATER)


# --- memory ------------------------------------------------------------------------------------------------
CHALLENGE = bytes(range(32))
MEMORY = Memory(CHALLENGE, 40)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 17, 38, 39])
def test_an_opened_block_follows_from_those_before_it(index: int) -> None:
    opening = MEMORY.open(index)
    check_opening(opening, index=index, root=MEMORY.root, count=40, challenge_id=CHALLENGE)
    for changed in ({"index": (index + 1) % 40}, {"root": bytes(32)}, {"challenge_id": bytes(32)}):
        terms: dict[str, Any] = {"index": index, "root": MEMORY.root, "count": 40, "challenge_id": CHALLENGE}
        with pytest.raises(VerificationFailed):
            check_opening(opening, **terms | changed)


def test_memory_filled_with_something_cheaper_is_caught_where_it_is_probed() -> None:
    """A prover that keeps zeros in half of its blocks and commits to them."""
    from protocol.merkle import merkle_path, merkle_root

    blocks = [bytes(MEMORY._block(i)) if i < 20 else bytes(params.BENCH_MEMORY_BLOCK_BYTES) for i in range(40)]
    root = merkle_root(blocks)
    caught = 0
    for index in range(2, 40):
        opening = MEMORY.open(index)
        partner = int.from_bytes(blocks[index - 1][:8], "little") % (index - 1)
        places = (index, index - 1, partner)
        paths = tuple(tuple(merkle_path(blocks, place)) for place in places)
        forged = type(opening)(index, tuple(blocks[place] for place in places), paths)
        if index < 20:
            check_opening(forged, index=index, root=root, count=40, challenge_id=CHALLENGE)
            continue
        with pytest.raises(VerificationFailed, match="does not follow"):
            check_opening(forged, index=index, root=root, count=40, challenge_id=CHALLENGE)
        caught += 1
    assert caught == 20


# --- what a card is worth ----------------------------------------------------------------------------------
def test_nobody_is_believed_to_be_faster_than_its_card() -> None:
    assert believed_ns(10**12, 5 * SECOND, Proven("witnessed", 10**11)) == 10 * SECOND
    assert believed_ns(10**12, 15 * SECOND, Proven("witnessed", 10**11)) == 15 * SECOND


def test_the_same_word_counts_less_the_less_is_proven() -> None:
    grades = [Proven("witnessed", 10**12), Proven("self-timed", 10**12), Proven("none", 0)]
    times = [believed_ns(10**9, 10 * SECOND, one) for one in grades]
    assert times == sorted(set(times))


@given(st.integers(1, 10**15), st.integers(0, 10**15), st.integers(1, 10**15))
def test_a_lie_about_speed_gains_nothing_beyond_one_core(operations: int, eta_ns: int, claimed: int) -> None:
    """Whatever is said, and whatever a self-timed card says, an unproven peer never seems faster than the limit."""
    floor = operations * 10**9 // params.UNPROVEN_SPEED_MAX
    for proven, eta in product([Proven("none", 0), Proven("self-timed", claimed)], [eta_ns, 0]):
        assert believed_ns(operations, eta, proven) >= floor
