"""Whether what came of an adversary is what its row in the catalogue says; and of honest peers, that nothing did."""

from __future__ import annotations

from functools import cache

from peer.simulated_frauds import work_of
from peer.simulated_work import initial_root
from peer.simulator import Faults
from tests.adversaries.catalogue import ADVERSARIES, Adversary
from tests.adversaries.stage import Outcome, play, stage_of
from tests.dispute_swarm import CALM
from tests.swarm_scenario import SEGMENTS, make_task

__all__ = ["NAMED", "control_of", "faults_of", "honest_troubles", "outcome_of", "right_root", "troubles"]

NAMED = {one.name: one for one in ADVERSARIES}


def faults_of(seed: int) -> Faults:
    """Every fourth seed is calm; the others draw what goes wrong in the world besides."""
    return CALM if seed % 4 == 0 else Faults.drawn_from(seed)


@cache
def outcome_of(name: str, seed: int) -> Outcome:
    """What comes of an adversary of the catalogue."""
    one = NAMED[name]
    return play(stage_of(seed, one.cast(), faults_of(seed), **one.scene))


def control_of(name: str, seed: int) -> Outcome:
    """The same market without it: its honest control."""
    return _control(tuple(sorted(NAMED[name].scene.items())), seed, faults_of(seed))


@cache
def _control(scene: tuple[tuple[str, object], ...], seed: int, faults: Faults) -> Outcome:
    return play(stage_of(seed, {}, faults, **dict(scene)))  # type: ignore[arg-type]


@cache
def right_root() -> str:
    """The end that honest work on the simulator's task comes to."""
    task = make_task(stage_of(0, {}).network)
    *_, (_, end) = work_of(task, range(SEGMENTS), initial_root(task.seed), "")
    return end.hex()


def honest_troubles(outcome: Outcome) -> list[str]:
    """What went wrong for a market of honest peers: nobody may be found wrong or lose a stake, whatever the world does,
    and the job comes to its right end."""
    found = []
    if outcome.culprits or outcome.burned:
        found.append(f"honest peers lost {outcome.culprits}, {outcome.burned} micro-credits burned")
    if "wrong" in outcome.findings or "slash" in outcome.findings:
        found.append(f"honest work was found wrong: {outcome.findings}")
    if outcome.state != "done" or outcome.final_root != right_root():
        found.append(f"the job ended as {outcome.state} with {outcome.final_root[:12]}")
    return found


def troubles(one: Adversary, outcome: Outcome, control: Outcome | None) -> list[str]:
    """What came out otherwise than the catalogue says; empty if nothing did.

    control: of the same seed in a calm world, where all of the row must hold. None: the world was not calm. Then a
    crash may cost anybody a dispute by silence, or end a deal before the fraud is looked at; but nobody honest loses
    any stake, and the submitter has the right result.
    """
    may_lose = {*one.cast(), *one.culprits, *one.perhaps}
    found = [f"{name} is honest and lost {micro}" for name, micro in outcome.culprits.items() if name not in may_lose]
    right = outcome.final_root == right_root()
    # One that is not found may still lose its deal to the world, and the job then ends right.
    other = not right if one.exact else right and control is not None
    if outcome.state != one.state or (one.state and other):
        found.append(f"the job ended as {outcome.state!r} with {outcome.final_root[:12]}")
    return found if control is None else found + _exact(one, outcome, control)


def _exact(one: Adversary, outcome: Outcome, control: Outcome) -> list[str]:
    amounts = {"lock": outcome.lock, "word": outcome.word, "fault": min(outcome.word, outcome.lock // 2)}
    wanted = {name: amounts[what] for name, what in one.culprits.items()}
    also = {name: outcome.word for name in one.perhaps if outcome.culprits.get(name) == outcome.word}
    found = []
    if outcome.culprits != {**wanted, **also}:
        found.append(f"{outcome.culprits} lost, not {wanted}")
    if outcome.findings != (findings := tuple(sorted([*one.findings, *["right"] * len(also)]))):
        found.append(f"found {outcome.findings}, not {findings}")
    if outcome.level not in one.levels or outcome.cause not in one.cause.split(" or "):
        found.append(f"{outcome.cause} at {outcome.level}, not {one.cause} at {' or '.join(one.levels)}")
    if one.retried is not None and outcome.retried != one.retried:
        found.append(f"the job went back to the market {outcome.retried} times, not {one.retried}")
    found += [f"{name} earned {outcome.free[name]}" for name in one.unpaid if outcome.free[name] > 0]
    found += [f"{name} was not penalised" for name in one.penalised if name not in outcome.penalised]
    if outcome.delay_s > control.delay_s + one.late_s:
        found.append(f"it took {outcome.delay_s:.0f} s, its control {control.delay_s:.0f} s")
    gained = sum(outcome.free[name] + outcome.stakes[name] for name in one.cast())
    if one.culprits and gained >= 0:
        found.append(f"{' and '.join(one.cast())} gained {gained} by it together")
    return [*found, *(f"control: {trouble}" for trouble in honest_troubles(control))]
