"""A float quarrel is pinpointed and judged: every fraud that shows loses at an element, and no honest machine does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.dispute_tolerant import disputed as dispute_of
from benchmarks.dispute_tolerant import files_of, followed_of, long_product
from protocol import merkle, params
from protocol.bounds import ACCUMULATED, ULPS
from protocol.dispute_claim import StubbornTracer
from protocol.dispute_evidence import Followed, evidence, read_followed, read_states
from protocol.dispute_following import Apart, Dissent, Dissented, FollowingTracer, read_element
from protocol.dispute_player import Tracer
from protocol.dispute_pursuit import Pursuit
from protocol.dispute_wire import ShowState, ShowStates, ShowTrace
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from tests.tolerant_scene import (
    ARRAYS,
    SEGMENT,
    TOLERANCE,
    Player,
    Recorded,
    base,
    disputed,
    elsewhere,
    facts,
    honest,
    program,
    pursued,
    seen,
    task,
)
from worker import checkpoint
from worker.dissent import Dissenter
from worker.training import run_segments

STEPS = 6


def test_a_solver_comes_to_its_own_bits_again() -> None:
    given = {"task": task(), "program": program(), "arrays": ARRAYS, "gauges": TOLERANCE.gauges}
    whole = list(run_segments(**given, base=None, segments=range(2)))  # type: ignore[arg-type]
    assert honest().step_roots()[-1] == whole[SEGMENT].out_root
    assert honest().state_roots(-1) == Player().state_roots(-1)
    assert [Player().trace_roots(step) for step in (0, 5)] == [honest().trace_roots(step) for step in (0, 5)]


FRAUDS = {
    "tf32": ("mm.default", "bmm.default"),
    "rate": ("mul.Tensor", "sub.Tensor", "div.Tensor", "add.Tensor"),
    "label": ("",),
    "other data": ("",),
    "skip": ("mul.Tensor", "sub.Tensor", "add.Tensor", "where.self"),
    "gauges": ("",),
}


@pytest.mark.parametrize("fraud", sorted(FRAUDS))
def test_a_fraud_is_led_to_an_element_and_loses(fraud: str) -> None:
    solver = Player(fraud)
    found = pursued(solver)
    assert found is not None
    followed, dissent = found
    assert followed.step == {"gauges": STEPS, "tf32": 0, "rate": 0}.get(fraud, 2)
    game = disputed(solver, followed, dissent)
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "leaf", "element"), game.descent()
    assert not game.result.both_wrong
    assert game.descent()[-2].op in FRAUDS[fraud]


def test_an_honest_solver_on_this_machine_shows_nothing_anywhere() -> None:
    for step in range(facts().ends):
        assert Dissenter(task(), program(), facts(), ARRAYS).first(seen(honest(), step)) is None


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> list[Followed]:
    return elsewhere(tmp_path_factory.mktemp("elsewhere"))


def test_an_honest_solver_under_another_blas_path_shows_nothing_anywhere(other: list[Followed]) -> None:
    assert other[0].states != tuple(honest().step_roots()), "the other kernels have other bits, else this shows nothing"
    for followed in other:
        assert Dissenter(task(), program(), facts(), ARRAYS).first(followed) is None


def test_no_lie_about_an_honest_solver_under_another_blas_path_wins(other: list[Followed]) -> None:
    first: dict[str, int] = {}
    last = max(update.value for update in program().updates)
    for value, node in enumerate(program().nodes, program().first_node):
        if node.op in {*ACCUMULATED, *ULPS} and value <= last:  # whose bits depend on the machine
            first[node.op] = value  # the last of its kind
    for turn, (op, value) in enumerate(sorted(first.items())):
        followed = other[turn % STEPS]
        array = followed.trace[value]
        element = turn * 7919 % array.size
        own = read_element(array, element) ^ 1 << turn % 24
        game = disputed(Recorded(followed), followed, Dissent(followed.step, value, element, own))
        assert game.result is not None
        assert (game.result.loser, game.result.cause) == ("challenger", "leaf"), op


# --- what a solver may try ---------------------------------------------------------------------------------
def test_a_solver_that_plays_another_run_than_it_showed_loses() -> None:
    found = pursued(Player("label"))
    assert found is not None
    game = disputed(_Claiming(found[0].states[-1]), *found)
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "malformed")
    assert "before the challenge" in game.result.what


class _Claiming(Player):
    """Who showed a fraud, and plays honest work that ends in the fraud's root."""

    def __init__(self, end: bytes) -> None:
        super().__init__()
        self._end_root = end

    def step_roots(self) -> list[bytes]:
        return [*list(super().step_roots())[:-1], self._end_root]


@pytest.mark.parametrize("where", ["trained", "put back"])
def test_a_state_that_does_not_come_from_its_trace_loses(where: str) -> None:
    solver = Player()
    step, name = (STEPS - 1, "head.weight") if where == "trained" else (STEPS, facts().names[0])
    assert name in facts().names
    solver._ends[step] = list(solver.state_roots(step))
    end = {key: tensor.numpy() for key, tensor in solver.state_before(step + 1).items()}
    end[name] = end[name] + np.float32(1)
    if where == "put back":
        cheat: Tracer = StubbornTracer(solver, end)
        followed = seen(cheat, step)
    else:
        solver._ends[step][facts().names.index(name)] = merkle.tensor_root(end[name])
        solver._roots[step] = merkle.state_root_of(dict(zip(facts().names, solver._ends[step], strict=True)))
        solver._states[STEPS] = {key: torch.from_numpy(array) for key, array in end.items()}
        cheat, followed = solver, seen(solver, step)
    dissent = Dissenter(task(), program(), facts(), ARRAYS).first(followed)
    assert dissent is not None
    game = disputed(cheat, followed, dissent)
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "malformed" if where == "trained" else "leaf")


def test_evidence_that_is_not_under_its_roots_is_refused() -> None:
    states = evidence(ShowStates(), honest())
    with pytest.raises(VerificationFailed, match="that the solver signed"):
        read_states(facts(), states, bytes(32))
    with pytest.raises(MalformedRecord, match="7 states"):
        read_states(facts(), states[:-32], None)
    roots = read_states(facts(), states, None)
    before, trace = evidence(ShowState(1), honest()), evidence(ShowTrace(1), honest())
    given = {"in_root": checkpoint.state_root(checkpoint.load(base())), "base": base()}
    read_followed(facts(), 1, roots, before=before, after=trace, **given)
    with pytest.raises(VerificationFailed, match="before step 2"):
        read_followed(facts(), 2, roots, before=before, after=trace, **given)
    with pytest.raises(VerificationFailed, match="after step 1"):
        read_followed(facts(), 1, roots, before=before, after=bytes(32) + trace[32:], **given)
    with pytest.raises(MalformedRecord, match="trace of"):
        read_followed(facts(), 1, roots, before=before, after=trace[:-1], **given)
    with pytest.raises(MalformedRecord, match="neither 0 nor 1"):
        read_followed(facts(), 1, roots, before=before, after=trace[:4096] + b"\2" * (len(trace) - 4096), **given)
    with pytest.raises(LocalProtocolError, match="no other than"):
        same = seen(honest(), 1)
        value = program().updates[0].value
        FollowingTracer(facts(), same, Dissent(1, value, 0, read_element(same.trace[value], 0)))


def test_an_index_out_of_range_is_led_to_an_element_that_reads_it() -> None:
    followed = seen(honest(), 1)
    value, node = next(
        (v, n) for v, n in enumerate(program().nodes, program().first_node) if n.op == "embedding.default"
    )
    index = list(node.refs())[1]
    places = followed.trace[index].copy()
    places.reshape(-1)[5] = 10**6
    forged = dataclasses.replace(followed, trace={**followed.trace, index: places})
    dissent = Dissenter(task(), program(), facts(), ARRAYS)._in_node(forged, value)
    assert dissent is not None
    assert dissent.element == 5 * node.shape[-1]


# --- which step is looked into -----------------------------------------------------------------------------
NEAR, FAR = Apart(TOLERANCE.l1_ppb, TOLERANCE.l2_ppb), Apart(TOLERANCE.l1_ppb + 1, 0)
NOTHING = Dissented(None, bytes(32), bytes(32), bytes(32))


@pytest.mark.parametrize("first_far", range(1, 8))
def test_the_search_finds_the_step_that_ends_far(first_far: int) -> None:
    pursuit, asked = Pursuit(facts(), TOLERANCE), []
    while pursuit.step is None:
        due = pursuit.due()
        assert due is not None and due.files == (pursuit.wants(),)
        asked.append(due.ask.step)
        pursuit.apart(FAR if due.ask.step >= first_far else NEAR)
    assert pursuit.step == first_far - 1
    assert len(asked) <= 3


def test_the_search_goes_on_to_the_right_and_comes_to_an_end() -> None:
    pursuit, tried = Pursuit(facts(), TOLERANCE), []
    while not pursuit.over:
        if pursuit.step is None:
            pursuit.apart(FAR)
        else:
            tried.append(pursuit.step)
            pursuit.dissented(NOTHING)
    assert tried == list(range(params.PURSUITS_MAX))
    assert pursuit.found is None and pursuit.wants() is None
    for told, tell in ((NEAR, pursuit.apart), (NOTHING, pursuit.dissented)):
        with pytest.raises(LocalProtocolError, match="was not asked for"):
            tell(told)  # type: ignore[operator]


# --- how long a sum may be -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("inner", "judged"), [(640, True), (641, False)])
def test_a_product_is_judged_up_to_what_a_leaf_opens(inner: int, judged: bool) -> None:
    model = long_product(inner)
    solver = model.tracer()
    followed = followed_of(model, 0, files_of(solver, 0))
    found = dispute_of(model, solver, followed, Dissent(0, 3, 777, 0x3F800000))
    assert (found["loser"], found["cause"]) == ("challenger", "leaf" if judged else "withheld")
    assert found["opened_bytes"] < 200 * 1024
    cheat = model.tracer().commit("bf16", at=0)
    seen_of_it = followed_of(model, 0, files_of(cheat, 0))
    dissent = model.dissenter().first(seen_of_it)
    assert (dissent is not None and dissent.value == 3) == judged, "a challenger leads nobody where nobody can judge"
