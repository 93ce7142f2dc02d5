"""Who checks what: drawn by stake and bench card, from randomness nobody foresees, whatever the updates look like."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import islice, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import params
from protocol.codec import blake
from protocol.errors import LocalProtocolError
from protocol.merkle import merkle_root
from protocol.sampling import checker_weight, draw_weighted, randomness, select_segments

LEAST = 1_000_000
NAMES = [blake("test/checker", bytes([n])) for n in range(8)]


def seeded(number: int) -> bytes:
    return blake("test/randomness", number.to_bytes(4, "big"))


def within(count: int, trials: int, part: int, whole: int) -> bool:
    """Whether `count` of `trials` is within five standard deviations of part/whole, in whole numbers."""
    off = count * whole - trials * part
    return off * off <= 25 * trials * part * (whole - part)


def test_who_is_drawn_first_and_second_follows_the_weights() -> None:
    """4,000 fixed seeds. Second place is in proportion among those left, so its chances are sums of products."""
    weights = dict(zip(NAMES, (1, 2, 5, 12), strict=False))
    trials = 4000
    orders = [tuple(islice(draw_weighted(seeded(n), b"verifier", weights), 2)) for n in range(trials)]
    first, pairs = Counter(order[0] for order in orders), Counter(orders)
    for name, weight in weights.items():
        assert within(first[name], trials, weight, 20), first
    for one, two in product(weights, weights):
        if one != two:
            assert within(pairs[one, two], trials, weights[one] * weights[two], 20 * (20 - weights[one])), pairs


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**70)), st.binary(min_size=32, max_size=32))
def test_everybody_is_drawn_once_in_an_order_that_no_list_decides(weights: dict[bytes, int], random: bytes) -> None:
    drawn = list(draw_weighted(random, b"verifier", weights))
    assert sorted(drawn) == sorted(weights)
    assert drawn == list(draw_weighted(random, b"verifier", dict(reversed(weights.items()))))
    assert drawn[:1] == list(islice(draw_weighted(random, b"verifier", weights), 1))


def test_roles_are_drawn_apart() -> None:
    weights = dict.fromkeys(NAMES, 1)
    both = [
        [next(draw_weighted(seeded(n), role, weights)) for n in range(64)] for role in (b"verifier", b"whistleblower")
    ]
    assert sum(a == b for a, b in zip(*both, strict=True)) < 24  # 8 of 64 by chance


@pytest.mark.parametrize("weight", [0, -1, True, 1.5])
def test_a_weight_is_a_whole_number_above_zero(weight: int) -> None:
    with pytest.raises(LocalProtocolError, match="weight"):
        next(draw_weighted(seeded(0), b"verifier", {NAMES[0]: weight}))


def test_a_stake_counts_in_proportion_up_to_a_cap_and_half_without_a_card() -> None:
    def weight(stake: int, *, carded: bool = True) -> int:
        return checker_weight(stake, stake_min_micro=LEAST, carded=carded)

    assert weight(LEAST - 1) == 0
    assert weight(3 * LEAST) == 3 * weight(LEAST)
    assert 2 * weight(3 * LEAST, carded=False) == weight(3 * LEAST)
    cap = params.CHECKER_STAKES_MAX * LEAST
    assert weight(10**6 * cap) == weight(cap) == params.CHECKER_STAKES_MAX * weight(LEAST)
    assert sum(weight(LEAST * 2) for _ in range(3)) == weight(LEAST * 6), "splitting a stake gains nothing"
    assert checker_weight(0, stake_min_micro=0, carded=False) == 1, "where no stake is asked for everybody is drawn"


def test_one_whale_does_not_judge_everything() -> None:
    """A thousand times the stake of each of seven others, who have the least one: 8 of 15 checks, not 99 of 100."""
    weights = {name: checker_weight(LEAST, stake_min_micro=LEAST, carded=True) for name in NAMES[1:]}
    weights[NAMES[0]] = checker_weight(1000 * LEAST, stake_min_micro=LEAST, carded=True)
    firsts = Counter(next(draw_weighted(seeded(n), b"verifier", weights)) for n in range(3000))
    assert within(firsts[NAMES[0]], 3000, 8, 15), firsts


# --- segments ----------------------------------------------------------------------------------------------
def proof_of(sizes: list[int], salt: int) -> bytes:
    """The id of a proof over checkpoints whose updates have these sizes."""
    state, roots = salt, []
    for size in sizes:
        state += size
        roots.append(blake("test/state", state.to_bytes(16, "big")))
    return blake("test/proof", merkle_root(roots))


def test_no_segment_is_drawn_oftener_for_the_size_of_its_update() -> None:
    """A solver that cheats a little, or a lot, in one segment is as likely caught as one that cheats in any other."""
    assert list(inspect.signature(select_segments).parameters) == ["random", "first", "last", "permille", "minimum"]
    trials = 1500
    for size in (0, 1, 10**9):
        counts: Counter[int] = Counter()
        for n in range(trials):
            proof = proof_of([1000, 1000, 1000, size, 1000, 1000, 1000, 1000, 1000, 1000], n * 10**12)
            random = randomness(proof=proof, submitter_seed=b"a" * 32, solver_seed=b"b" * 32)
            counts.update(select_segments(random, first=0, last=10, permille=200, minimum=2))
        assert sum(counts.values()) == 2 * trials
        assert all(within(counts[segment], trials, 2, 10) for segment in range(10)), counts


def test_who_knows_the_proof_and_one_seed_knows_nothing_of_the_draw() -> None:
    trials = 1500
    proof = proof_of([1] * 10, 7)
    for known in ("submitter", "solver"):
        other = "solver" if known == "submitter" else "submitter"
        counts: Counter[int] = Counter()
        for n in range(trials):
            seeds = {f"{known}_seed": b"k" * 32, f"{other}_seed": seeded(n)}
            counts.update(select_segments(randomness(proof=proof, **seeds), first=0, last=10, permille=100, minimum=1))
        assert all(within(counts[segment], trials, 1, 10) for segment in range(10)), counts
