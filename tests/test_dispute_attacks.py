"""A liar that sends anything at any time never beats an honest player, and no referee falls over it."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest

from protocol.codec import encode
from protocol.dispute import SIDES
from protocol.dispute_partials import _EmbeddingGradient, _Largest, _Product, _Reduced, _Sum
from protocol.dispute_player import answer
from protocol.dispute_wire import Partials, Revealed
from protocol.errors import RemoteProtocolError
from protocol.operations import TensorType
from tests.dispute_scene import game_of, honest
from tests.test_dispute import LIES, lying

SPECIAL = np.array(
    [0x00000000, 0x80000000, 0x7FC00000, 0xFFC00001, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x007FFFFF, 0x00800000,
     0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000, 0x34000000, 0x3F7FFFFF, 0x40490FDB], np.uint32
)  # fmt: skip


def mutated(rng: random.Random, body: bytes, others: list[bytes]) -> bytes:
    kind = rng.randrange(7)
    if kind == 0 and body:
        at = rng.randrange(len(body))
        return body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
    if kind == 1:
        return rng.choice(others)
    if kind == 2:
        return body[: rng.randrange(len(body) + 1)]
    if kind == 3:
        return encode(Revealed((rng.randbytes(32),) * rng.randint(1, 16), (), None))
    if kind == 4:
        return encode(Partials(((rng.randint(-200, 200),) * rng.randint(1, 3),) * rng.randint(1, 16)))
    return body


@pytest.mark.parametrize("seed", range(24))
def test_no_mutation_of_true_or_false_answers_beats_an_honest_player(seed: int) -> None:
    rng = random.Random(seed)
    liar, truth = lying(rng.choice(list(LIES))), honest()
    side = rng.choice(SIDES)
    pair = {side: liar, **{other: truth for other in SIDES if other != side}}
    block = rng.choice((512, 1))
    game = game_of(pair["solver"], pair["challenger"], block=block)
    moves: list[tuple[str, int, bytes]] = []
    others = [b"", b"\xc1", b"\x91" * 3000]
    until = rng.randrange(20)
    while game.owes():
        for owed in game.owes():
            question = game.question(owed)
            assert question is not None
            body = answer(question, pair[owed]).body
            others.append(body)
            if owed == side:
                if rng.random() < 0.3:
                    body = answer(question, truth).body  # its opponent's answer
                if game.number >= until:
                    body = mutated(rng, body, others)
            moves.append((owed, game.number, body))
        for move in moves[-2:]:
            game.take(*move)
    if game.wants_opening():
        question = game.question("challenger")
        assert question is not None
        opening = answer(question, truth).opening
        for _ in range(20):
            forged = mutated(rng, opening, others)
            if forged != opening:
                with pytest.raises(RemoteProtocolError):
                    game.open(forged)
        game.open(opening)
    assert game.result is not None and game.result.loser == side
    again = game_of(pair["solver"], pair["challenger"], block=block)
    rng.shuffle(moves)
    for move in moves:
        again.take(*move)
    if again.wants_opening():
        again.open(opening)
    assert (again.result, again.transcript()) == (game.result, game.transcript())


def bits(array: np.ndarray, element: int) -> int:
    flat = array.reshape(-1)
    return int(flat.view(np.uint32)[element]) if array.dtype == np.float32 else int(flat[element])


@pytest.mark.parametrize("seed", range(30))
def test_what_a_player_computes_is_what_a_referee_adds_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 16, 17, 33]))
    few = SPECIAL if seed % 3 else SPECIAL[[0, 1, 6, 7, 8, 9, 12, 13, 14, 15, 16]]
    a, b = (rng.choice(few, (3, n)).view(np.float32) for _ in range(2))
    index = rng.integers(0, 4, n)
    column = np.ascontiguousarray(b.T)
    over = _Reduced(0, TensorType("float32", (3, n)), (1,), (1, 0))
    whole = _Reduced(0, TensorType("float32", (3, n)), (0, 1), (0, 0))
    chains = [
        *(_Product(0, 1, n, n, 2, 3, width) for width in (8, 15, 22)),
        *(kind(reduced) for kind in (_Sum, _Largest) for reduced in (over, whole)),
        *(_EmbeddingGradient(1, 2, n, 3, row, 1, 4, padding) for row in range(4) for padding in (-1, 2)),
    ]
    arrays = {0: a, 1: column, 2: index}
    for chain in chains:
        found = chain.partials(arrays.__getitem__, list(range(chain.terms + 1)))
        assert found[0] == chain.start
        for term in range(chain.terms):
            values = [bits(arrays[value], element) for value, element in chain.reads(term)]
            # A tile holds each NaN as the one that is canonical.
            values = [0x7FC00000 if value == 0xFFC00001 else value for value in values]
            assert chain.advance(found[term], term, values) == found[term + 1]
        for partial in found[1:]:
            assert all(low <= number <= high for number, (low, high) in zip(partial, chain.bounds, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_of_two_liars_one_loses_and_no_referee_falls(seed: int) -> None:
    rng = random.Random(seed)
    solver, challenger = (lying(name) for name in rng.sample(list(LIES), 2))
    pair = {"solver": solver, "challenger": challenger}
    game = game_of(solver, challenger, block=rng.choice((512, 1)))
    others = [b"", b"\xc1"]
    until = rng.randrange(4, 25)
    while game.owes():
        number = game.number
        for side in SIDES:
            question = game.question(side)
            assert question is not None or game.result is not None
            if question is None:
                break
            body = answer(question, pair[side]).body
            others.append(body)
            game.take(side, number, mutated(rng, body, others) if number >= until else body)
    if game.wants_opening():
        for tracer in (solver, challenger, honest()):
            question = game.question("challenger")
            if question is not None:
                with suppress(RemoteProtocolError):
                    game.open(answer(question, tracer).opening)
        game.forfeit("challenger", "withheld")
    assert game.result is not None


@pytest.mark.parametrize("seed", range(20))
def test_no_partial_result_within_bounds_makes_a_referee_fall(seed: int) -> None:
    rng = random.Random(seed)
    over = _Reduced(0, TensorType("float32", (3, 5)), (1,), (1, 0))
    chains = [
        *(_Product(0, 1, 5, 5, 2, 3, width) for width in (8, 15, 22)),
        *(kind(over) for kind in (_Sum, _Largest)),
        _EmbeddingGradient(1, 2, 5, 3, 1, 1, 4, -1),
    ]
    for chain in chains:
        for _ in range(30):
            partial = tuple(rng.choice((low, high, 0, rng.randint(low, high))) for low, high in chain.bounds)
            assert 0 <= chain.finish(partial) < 2**32
            for term in range(chain.terms):
                values = [1 if value == 2 else int(rng.choice(SPECIAL)) for value, _ in chain.reads(term)]
                chain.advance(partial, term, values)
