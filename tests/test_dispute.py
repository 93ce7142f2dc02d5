"""The pinpoint game: whoever lies, and wherever, loses, at the level where the lie stands; nobody else ever does."""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import params
from protocol.codec import encode
from protocol.dispute import SIDES, Game
from protocol.dispute_claim import StubbornTracer
from protocol.dispute_player import Tracer, answer, decode_question
from protocol.dispute_wire import Revealed, ShowNodes, ShowPartials, ShowTile, TileShown
from protocol.errors import LocalProtocolError, MalformedRecord
from tests.dispute_scene import Liar, Misadder, flipped, game_of, honest, play, program, value_of

LAST = 2  # the step after which no other one overwrites a lie

# The value that is changed, the element, and the level at which the dispute ends.
LIES = {
    "a batch of other data": ("x", 1, "element"),
    "a row looked up": ("h", 40, "element"),
    "a view": ("f", 3, "element"),
    "a product": ("z", 35, "block"),
    "a maximum": ("m", 2, "block"),
    "a difference": ("s", 5, "element"),
    "an exponential": ("e", 100, "element"),
    "a sum": ("t", 5, "block"),
    "a quotient": ("p", 203, "element"),
    "a random number": ("u", 3, "element"),
    "a comparison": ("kept", 33, "element"),
    "a choice": ("d", 8, "element"),
    "a permutation": ("wt", 34, "element"),
    "a gradient": ("dh", 80, "block"),
    "an embedding's gradient": ("ge", 36, "block"),
    "a weight's gradient": ("gw", 36 * 34 - 1, "block"),
    "a rate times a gradient": ("we", 0, "element"),
    "an update": ("w'", 1000, "element"),
    "a counter of 64 bits": ("count'", 1, "element"),
    "a product of matrices in a batch": ("gram'", 17, "block"),
    "a slice": ("part", 101, "element"),
    "a concatenation": ("mixed'", 169, "element"),
    "state that is handed on": ("frozen", 2, "state"),
    "the learning rate": ("learning_rate", 0, "state"),
    "the step key": ("step_key", 1, "state"),
    "a literal": ("one", 0, "state"),
}


@cache
def lying(name: str) -> Liar:
    value, element, _ = LIES[name]
    bit = {"x": 0, "step_key": 0, "count'": 40, "u": 29, "ge": 30}.get(value, 22)
    return flipped(LAST, value_of(value) if value != "one" else 13, element, bit=bit)


def played(solver: Tracer, challenger: Tracer, **fields: int) -> Game:
    game = game_of(solver, challenger, **fields)
    play(game, solver, challenger)
    return game


# --- a lie at every place ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LIES)
def test_whichever_side_lies_about_one_value_loses_where_the_lie_is(name: str) -> None:
    for block, side in itertools.product((512, 1), ("solver", "challenger")):
        pair = (lying(name), honest()) if side == "solver" else (honest(), lying(name))
        result = played(*pair, block=block).result
        assert result is not None
        assert (result.loser, result.cause, result.level) == (side, "leaf", LIES[name][2])
        assert not result.both_wrong


@pytest.mark.parametrize("step", range(3))
def test_the_first_wrong_step_is_found(step: int) -> None:
    cheat = flipped(step, value_of("w'"), 7, bit=22)
    for pair, side in (((cheat, honest()), "solver"), ((honest(), cheat), "challenger")):
        game = played(*pair)
        assert game.result is not None and game.result.loser == side
        assert game.descent()[0].where == f"step {3 + step}"
        assert [rung.level for rung in game.descent()] == ["step", "state", "node", "tile", "element", "element"]


@pytest.mark.parametrize("name", [update.name for update in program().updates])
def test_a_wrong_end_of_every_state_tensor_is_found(name: str) -> None:
    end = dict(honest().states[-1])
    changed = end[name].copy().reshape(-1)
    changed[-1] += 1
    cheat = StubbornTracer(honest(), {**end, name: changed.reshape(end[name].shape)})
    for pair, side in (((cheat, honest()), "solver"), ((honest(), cheat), "challenger")):
        game = played(*pair)
        assert game.result is not None
        assert (game.result.loser, game.result.cause) == (side, "leaf")
        assert game.descent()[1].where == f"state tensor {name}"


def partial_changed(index: int, by: int) -> Any:
    def change(partial: tuple[int, ...]) -> tuple[int, ...]:
        return (*partial[:index], partial[index] + by, *partial[index + 1 :])

    return change


PHASES = {
    "the exponent of a row": ("z", 36, 5, 0, 3),
    "the exponent of a column": ("z", 36, 20, 1, 3),
    "an exponent among the sums": ("z", 36, 40, 1, 2),
    "a product's first term": ("z", 36, 37, 2, 2**24),
    "a product's last term": ("z", 36, 72, 2, 2**24),
    "a product of a batch": ("gram'", 4, 50, 2, 2**24),
    "the exponent of a sum": ("t", 1, 10, 0, 20),
    "a sum's term": ("t", 1, 50, 1, 2**27),
    "a maximum": ("m", 2, 34, 0, 2**22),
    "an embedding's exponent": ("ge", 36 * 3, 2, 0, 20),
    "a row that was not read": ("ge", 36 * 2, 9, 1, 2**25),
    "a row that is said to be read": ("ge", 36 * 2, 12, 2, -1),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_wrong_partial_result_of_every_phase_is_found(name: str) -> None:
    value, element, term, index, by = PHASES[name]
    if value == "ge":  # a row that the batch did read
        rows = honest().tensors(LAST, [value_of("x")])[value_of("x")].reshape(-1)
        element = 36 * int(rows[0])
    cheat = Misadder(LAST, value_of(value), element, term, partial_changed(index, by))
    for block, side in itertools.product((1, 8), SIDES):
        game = played(*((cheat, honest()) if side == "solver" else (honest(), cheat)), block=block)
        assert game.result is not None
        assert (game.result.loser, game.result.cause, game.result.level) == (side, "leaf", "block")
        low, high = map(int, game.descent()[-2].where.split()[1:4:2])
        assert low < term <= high <= low + block


@settings(derandomize=True, deadline=None, max_examples=10, database=None)
@given(st.randoms(use_true_random=False))
def test_no_lie_at_a_random_place_wins_and_no_honest_player_loses(rng: random.Random) -> None:
    facts = honest().facts
    step, value = rng.randrange(1, 3), facts.trace_value(rng.randrange(facts.leaves("trace", 0)))
    kind = facts.type_of(value)
    bit = rng.randrange(32) if kind.dtype == "float32" else 0
    try:
        cheat = flipped(step, value, rng.randrange(kind.elements), bit=bit)
    except MalformedRecord:  # a row that the table does not have: not even a liar can go on from there
        return
    if cheat.step_roots()[-1] == honest().step_roots()[-1]:
        return
    side = rng.choice(SIDES)
    game = played(*((cheat, honest()) if side == "solver" else (honest(), cheat)), block=rng.choice((1, 16, 512)))
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.both_wrong) == (side, "leaf", False)
    assert game.number < params.DISPUTE_ROUNDS_MAX


def test_of_two_wrong_values_the_solver_answers_for_its_own() -> None:
    one, other = flipped(LAST, value_of("w'"), 7, bit=22), flipped(LAST, value_of("w'"), 7, bit=20)
    for pair in ((one, other), (other, one)):
        result = played(*pair).result
        assert result is not None
        assert (result.loser, result.cause, result.both_wrong) == ("solver", "leaf", True)


def test_the_descent_names_the_users_line_and_the_three_values() -> None:
    rungs = played(lying("a product"), honest()).descent()
    node = next(rung for rung in rungs if rung.level == "node")
    assert (node.op, node.source) == ("mm.default", "model.py:12")
    last = rungs[-1]
    assert last.referee == last.challenger != last.solver


# --- moves -------------------------------------------------------------------------------------------------
def test_the_order_of_moves_and_repetitions_change_nothing() -> None:
    cheat = lying("a product")
    first = game_of(cheat, honest(), block=1)
    moves = play(first, cheat, honest())
    bodies = [move for move in moves if move[0]]
    rng = random.Random(4)
    for _ in range(5):
        shuffled = bodies * 2
        rng.shuffle(shuffled)
        game = game_of(cheat, honest(), block=1)
        for side, number, body in shuffled:
            game.take(side, number, body)
            game.take(side, number, b"another body for a move that was taken")
        for side, _, data in moves:
            if not side and game.wants_opening():
                game.open(data)
        assert (game.result, game.descent(), game.transcript()) == (first.result, first.descent(), first.transcript())


Bodies = dict[str, bytes]


@cache
def rounds(name: str, block: int) -> list[tuple[ShowNodes | ShowTile | ShowPartials, Bodies]]:
    """The rounds of a game about a lie, each with what is asked and what both sides answer."""
    players = {"solver": lying(name), "challenger": honest()}
    game, found = game_of(lying(name), honest(), block=block), []
    while not game.wants_opening() and game.result is None:
        questions = {side: game.question(side) or b"" for side in SIDES}
        bodies: Bodies = {side: answer(questions[side], players[side]).body for side in SIDES}
        found.append((decode_question(questions["solver"]).ask, bodies))
        number = game.number
        for side in SIDES:
            game.take(side, number, bodies[side])
    return found


def at(kind: type, tree: str = "", name: str = "an update", block: int = 512) -> tuple[Game, Bodies]:
    """A game in whose open round that kind of question is asked, and what both sides would answer."""
    game = game_of(lying(name), honest(), block=block)
    for ask, bodies in rounds(name, block):
        if isinstance(ask, kind) and (not tree or (isinstance(ask, ShowNodes) and ask.tree == tree)):
            return game, bodies
        number = game.number
        for side in SIDES:
            game.take(side, number, bodies[side])
    raise AssertionError("no round asks for it")


def hostile_nodes(body: bytes) -> dict[str, bytes]:
    true = msgspec.msgpack.decode(body, type=Revealed)
    nodes = true.nodes
    return {
        "no bytes": b"",
        "no msgpack": b"\xc1" * 40,
        "too long": body + bytes(params.MOVE_BYTES_MAX),
        "trailing": body + b"\x00",
        "another kind": encode(TileShown(bytes(4096))),
        "too few nodes": encode(Revealed(nodes[:-1] or nodes, (), None)),
        "too many nodes": encode(Revealed(nodes + nodes[:1], true.path, true.leaf)),
        "another node": encode(Revealed((bytes(32), *nodes[1:]), true.path, true.leaf)),
        "a short node": msgspec.msgpack.encode(["revealed", [bytes(31)] * len(nodes), list(true.path), true.leaf]),
        "a path too long": encode(Revealed(nodes, (*true.path, bytes(32)), true.leaf)),
        "a leaf not asked for": encode(Revealed(nodes, true.path, bytes(32))),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("tree", ["steps", "state", "trace", "tiles"])
def test_hostile_nodes_lose_at_once_and_raise_nothing(tree: str, side: str) -> None:
    for name, bad in hostile_nodes(at(ShowNodes, tree)[1][side]).items():
        game, bodies = at(ShowNodes, tree)
        if bad == bodies[side]:
            continue
        level = game.level
        game.take(side, game.number, bad)
        if side == "challenger":  # the solver's move may be malformed too, and then the solver loses
            assert game.result is None
            assert game.owes() == ("solver",)
            game.take("solver", game.number, bodies["solver"])
        assert game.result is not None, name
        assert (game.result.loser, game.result.cause, game.result.level) == (side, "malformed", level)
        assert game.result.what


def test_hostile_tiles_lose() -> None:
    for make in (lambda data: data[:-1], lambda data: bytes(4096), lambda data: data[:-4] + b"\x01\0\0\0"):
        game, bodies = at(ShowTile)
        data = msgspec.msgpack.decode(bodies["solver"], type=TileShown).data
        game.take("solver", game.number, msgspec.msgpack.encode(["tile", make(data)]))
        assert game.result is not None
        assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "malformed", "tile")


@pytest.mark.parametrize(
    "states",
    [
        [],
        [[0, 0, 0]],
        [[0, 0]] * 16,
        [[0, 0, 0, 0]] * 16,
        [[2**62, 0, 0]] * 16,
        [[0, -(2**62), 0]] * 16,
        [[0, 0, 2**63]] * 16,
        [["0", 0, 0]] * 16,
    ],
)
def test_hostile_partial_results_lose(states: list[Any]) -> None:
    game, _ = at(ShowPartials, name="a product", block=1)
    game.take("solver", game.number, msgspec.msgpack.encode(["partials", states]))
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "malformed", "block")


def test_two_malformed_moves_are_the_solvers_loss_whichever_comes_first() -> None:
    ends = set()
    for order in (SIDES, SIDES[::-1]):
        game = game_of(lying("an update"), honest())
        for side in order:
            game.take(side, 0, b"nothing")
        assert game.result is not None
        ends.add((game.result.loser, game.result.cause, game.result.operations, game.transcript()))
    assert len(ends) == 1
    assert ends.pop()[:2] == ("solver", "malformed")


def test_a_side_cannot_take_back_what_it_committed_to() -> None:
    """Two faithful liars' answers, mixed by one player: the second set is not under the first one's root."""
    game, _ = at(ShowNodes, "state")
    question = game.question("solver")
    assert question is not None
    game.take("solver", game.number, answer(question, lying("a concatenation")).body)
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "malformed")


# --- clocks, and calls out of turn -------------------------------------------------------------------------
@pytest.mark.parametrize("cause", ["silence", "withheld", "equivocation"])
@pytest.mark.parametrize("side", SIDES)
def test_a_side_that_forfeits_loses_at_the_level_that_is_open(side: str, cause: str) -> None:
    game = game_of(lying("an update"), honest())
    assert (game.level, game.owes(), game.replay) == ("segment", SIDES, True)
    game.forfeit(side, cause)
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.level) == (side, cause, "segment")
    assert (game.owes(), game.question(side), game.wants_opening()) == ((), None, False)
    before = game.result
    game.take("solver", 0, b"late")
    game.forfeit("solver", "silence")
    assert game.result == before


def test_only_rounds_that_need_the_whole_segment_say_so() -> None:
    cheat = lying("an update")
    game = game_of(cheat, honest())
    told = []
    players = dict(zip(SIDES, (cheat, honest()), strict=True))
    while not game.wants_opening():
        told.append((game.level, game.replay))
        bodies = {side: answer(game.question(side) or b"", players[side]) for side in SIDES}
        number = game.number
        assert all(body.wants_state == (game.replay and game.level == "state") for body in bodies.values())
        game.take("challenger", number, bodies["challenger"].body)
        assert game.owes() == ("solver",)
        assert game.question("challenger") is None
        game.take("solver", number, bodies["solver"].body)
    replays = [level for level, replay in told if replay]
    assert replays == ["segment", "state"]
    assert game.owes() == ()
    assert game.question("solver") is not None


def test_nothing_is_asked_out_of_turn() -> None:
    game = game_of(lying("an update"), honest())
    with pytest.raises(LocalProtocolError, match="no operands"):
        game.open(b"")
    with pytest.raises(LocalProtocolError, match="at most"):
        game.take("solver", params.DISPUTE_ROUNDS_MAX, b"")
    with pytest.raises(LocalProtocolError, match="no side"):
        game.take("submitter", 0, b"")
    with pytest.raises(LocalProtocolError, match="forfeits"):
        game.forfeit("solver", "leaf")
    with pytest.raises(LocalProtocolError, match="one root"):
        game_of(honest(), honest())
    with pytest.raises(LocalProtocolError, match="native"):
        Game(dataclasses.replace(game.terms, task=msgspec.structs.replace(game.terms.task, mode="native")))
    with pytest.raises(MalformedRecord, match="segment"):
        Game(dataclasses.replace(game.terms, segment=9))


# --- what it costs -----------------------------------------------------------------------------------------
def test_a_game_is_short() -> None:
    for name in ("a product", "an update", "a batch of other data"):
        bodies = [body for _, answers in rounds(name, 1) for body in answers.values()]
        assert sum(map(len, bodies)) < 15_000
        assert max(map(len, bodies)) <= params.MOVE_BYTES_MAX
