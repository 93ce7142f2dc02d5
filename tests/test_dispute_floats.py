"""The game over floats at every level, without torch: a solver's own run in Python integers, followed and judged."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import merkle
from protocol.bounds import bound_of, check_within
from protocol.dispute import Game, Pledge, Terms
from protocol.dispute_claim import StubbornTracer
from protocol.dispute_evidence import Followed, evidence, read_followed, read_states
from protocol.dispute_facts import Facts
from protocol.dispute_following import Dissent, FollowingTracer, read_element
from protocol.dispute_player import Tracer
from protocol.dispute_reference import ReferenceTracer, start_of
from protocol.dispute_wire import ShowState, ShowStates, ShowTrace
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.profile import Gauge, Tolerance
from protocol.reference_movement import Array
from protocol.safetensors import write
from protocol.task import TaskSpec
from tests import dispute_scene
from tests.dispute_scene import ARRAYS, DISPUTE, SEGMENT, flipped, play, program, value_of

GAUGES = (Gauge("gram", 2, (1,)),)
TOLERANCE = Tolerance(20_000, 110_000, GAUGES)
STEPS, LAST = 3, 2


@cache
def task() -> TaskSpec:
    return msgspec.structs.replace(dispute_scene.task(), mode="tolerant")


@cache
def base() -> dict[str, Any]:
    return ReferenceTracer(task(), program(), 0, arrays=ARRAYS, base=start_of(task(), program()), gauges=GAUGES).states[
        -1
    ]


def solver() -> ReferenceTracer:
    return ReferenceTracer(task(), program(), SEGMENT, arrays=ARRAYS, base=base(), gauges=GAUGES)


@cache
def honest() -> ReferenceTracer:
    return solver()


def facts() -> Facts:
    return honest().facts


def shown(player: Tracer, step: int) -> Followed:
    states = read_states(facts(), evidence(ShowStates(), player), player.step_roots()[-1])
    before = evidence(ShowState(step), player)
    after = evidence(ShowState(facts().ends) if facts().puts_back(step) else ShowTrace(step), player)
    in_root = merkle.state_root(base())
    return read_followed(facts(), step, states, in_root=in_root, before=before, after=after, base=write(base()))


def played(player: Tracer, dissent: Dissent) -> Game:
    followed = shown(player, dissent.step)
    challenger = FollowingTracer(facts(), followed, dissent, ARRAYS)
    ends = player.step_roots()[-1], challenger.found_root
    pledge: Pledge = followed.pledge(facts())
    game = Game(Terms(DISPUTE, task(), program(), SEGMENT, merkle.state_root(base()), *ends, 512, TOLERANCE, pledge))
    play(game, player, challenger)
    return game


# The value that is changed, the element, and whether the lowest bit of it is one an honest machine may have: a row of
# the embedding that no token reads is a sum of nothing, which is exact.
PLACES = {
    "x": (1, False), "h": (40, False), "f": (3, False), "z": (35, True), "m": (2, False), "s": (5, False),
    "e": (100, True), "t": (5, True), "p": (203, False), "u": (3, False), "kept": (33, False), "d": (8, False),
    "wt": (34, False), "dh": (80, True), "ge": (36, False), "gw": (36 * 34 - 1, True), "we": (0, False),
    "w'": (1000, False), "count'": (1, False), "gram'": (3, True), "part": (101, False), "mixed'": (169, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_value_is_judged_by_what_an_honest_machine_may_have(name: str) -> None:
    value, (element, loose) = value_of(name), PLACES[name]
    kind = facts().type_of(value)
    for bit in (22, 0) if kind.dtype == "float32" else (0,):
        own = read_element(honest().tensors(LAST, [value])[value], element)
        game = played(flipped(LAST, value, element, bit=bit, truth=honest()), Dissent(LAST, value, element, own))
        assert game.result is not None
        inside = loose and bit == 0
        told = (game.result.loser, game.result.cause, game.result.level)
        assert told == ("challenger" if inside else "solver", "leaf", "element"), (bit, game.result.what)
        assert not game.result.both_wrong


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_lie_about_an_honest_solver_wins(data: st.DataObject) -> None:
    nodes = range(program().first_node, max(update.value for update in program().updates) + 1)
    value = data.draw(st.sampled_from([v for v in nodes if facts().type_of(v).elements]))
    step = data.draw(st.sampled_from(range(STEPS)))
    array = honest().tensors(step, [value])[value]
    element = data.draw(st.sampled_from(range(array.size)))
    wide = {"bool": 1, "float32": 31}.get(str(array.dtype), 40)
    own = read_element(array, element) ^ 1 << data.draw(st.sampled_from(range(wide)))
    game = played(honest(), Dissent(step, value, element, own))
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("challenger", "leaf")


def test_every_element_of_the_reference_is_one_an_honest_machine_may_have() -> None:
    arrays = {
        v: honest().tensors(LAST, [v])[v] for v in range(len(program().types)) if facts().computed(v, LAST) is None
    }
    held = {
        v: Array(str(a.dtype), a.shape, tuple(read_element(a, i) for i in range(a.size))) for v, a in arrays.items()
    }
    for name in ("z", "t", "dh", "ge", "gw", "gram'"):
        value = value_of(name)
        node = facts().node(value)
        assert node is not None
        arguments = facts().arguments(node, held.__getitem__)
        for element in range(0, held[value].type.elements, 7):
            check_within(held[value].elements[element], bound_of(node.op, arguments, element), "float32", name)


@pytest.mark.parametrize(("element", "kept"), [(3, False), (12, True)])
def test_what_is_put_back_is_judged_against_the_base_and_the_rest_against_the_step(element: int, kept: bool) -> None:
    raw, end = honest().states[STEPS]["gram"].reshape(-1), honest().states[STEPS + 1]["gram"].reshape(-1)
    assert (end[element] == base()["gram"].reshape(-1)[element]) == kept
    assert (end[element] == raw[element]) != kept
    value = program().inputs.index(next(item for item in program().inputs if item.name == "gram"))
    claimed = {name: array.copy() for name, array in honest().states[-1].items()}
    claimed["gram"].reshape(-1)[element] = raw[element] if kept else raw[element] + 1
    right = read_element(end, element)
    for player, own, loser in (
        (StubbornTracer(honest(), claimed), right, "solver"),
        (honest(), right ^ 1, "challenger"),
    ):
        game = played(player, Dissent(STEPS, value, element, own))
        assert game.result is not None
        assert (game.result.loser, game.result.cause, game.result.level) == (loser, "leaf", "element")
        assert [rung.level for rung in game.descent()][:2] == ["step", "state"]


@pytest.mark.parametrize("name", ["frozen", "rate"])
def test_state_that_no_node_makes_is_judged_exactly(name: str) -> None:
    claimed = {key: array.copy() for key, array in honest().states[LAST + 1].items()}
    claimed[name] = claimed[name] + 1
    cheat = solver()
    cheat.states[LAST + 1] = claimed
    cheat.states[LAST + 2] = claimed | {"gram": cheat.states[LAST + 2]["gram"]}
    value = program().inputs.index(next(item for item in program().inputs if item.name == name))
    game = played(cheat, Dissent(LAST, value, 0, 0))
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "leaf", "state")


def test_a_dissent_is_a_place_of_the_step_that_is_followed() -> None:
    followed = shown(honest(), LAST)
    literal, loss = len(program().inputs), value_of("loss")
    for dissent, what in (
        (Dissent(0, loss, 0, 0), "is followed"),
        (Dissent(LAST, len(program().types), 0, 0), "is followed"),
        (Dissent(LAST, literal, 0, 0), "computed by everybody"),
    ):
        with pytest.raises(LocalProtocolError, match=what):
            FollowingTracer(facts(), followed, dissent)


def test_gauges_of_no_such_state_and_another_mode_are_refused() -> None:
    gram = program().inputs.index(next(item for item in program().inputs if item.name == "gram"))
    assert (
        facts().gauge_mask(gram).tolist()
        == [facts().is_gauge(gram, at) for at in range(18)]
        == [False] * 9 + [True] * 9
    )
    for gauge in (Gauge("gram", 3, (0,)), Gauge("nothing", 1, (0,)), Gauge("count", 1, (0,))):
        with pytest.raises(MalformedRecord, match="equal parts"):
            Facts(task(), program(), SEGMENT, (gauge,))
    terms = Terms(DISPUTE, task(), program(), SEGMENT, bytes(32), b"a" * 32, b"b" * 32, 512)
    with pytest.raises(LocalProtocolError, match="tolerant"):
        Game(terms)


def test_an_opening_of_what_is_put_back_holds_the_one_tile_and_no_other() -> None:
    value = program().inputs.index(next(item for item in program().inputs if item.name == "gram"))
    followed = shown(honest(), STEPS)
    dissent = Dissent(STEPS, value, 12, read_element(honest().states[-1]["gram"], 12) ^ 1)
    challenger = FollowingTracer(facts(), followed, dissent, ARRAYS)
    ends = honest().step_roots()[-1], challenger.found_root
    game = Game(Terms(DISPUTE, task(), program(), SEGMENT, merkle.state_root(base()), *ends, 512, TOLERANCE))
    wrong = _answer_as_of(game, challenger)
    with pytest.raises(VerificationFailed, match="before the segment"):
        game.open(wrong)
    assert game.result is None


def _answer_as_of(game: Game, challenger: Tracer) -> bytes:
    """The opening of the state before the step where that before the segment is due."""
    from protocol.dispute_player import _opened, answer

    while not game.wants_opening():
        number, asked = game.number, {side: game.question(side) for side in ("solver", "challenger")}
        for side, question in asked.items():
            assert question is not None
            game.take(side, number, answer(question, honest() if side == "solver" else challenger).body)
    value = program().inputs.index(next(item for item in program().inputs if item.name == "gram"))
    return _opened(facts(), STEPS, {(value, 12)}, honest().tensors(STEPS, [value]), honest())
