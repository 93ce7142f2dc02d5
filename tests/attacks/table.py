"""The table of attacks in docs/security.md, made by running them: `python -m tests.attacks.table` writes it.

Each column is one kind of owner; a machine can only fill those that it can be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.attacks.as_user import CANNOT, UIDS
from tests.attacks.catalogue import ATTACKS, SPEECHES, STUDIED

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- attacks: begin -->", "<!-- attacks: end -->"
COMMAND = "python -m tests.attacks.table"
NONE, FILTERED, NAMESPACED, CONTAINED = 0, 2, 3, 4
COLUMNS = {
    "user, no bubblewrap": "an ordinary user without bubblewrap, FILTERED",
    "user": "an ordinary user, NAMESPACED",
    "user with group": "an ordinary user with a control group, CONTAINED",
    "root": "root, CONTAINED",
}
SECONDS_MAX = 300  # of one harness; it takes 20, ten times that on a loaded machine

Outcome = dict[str, Any]
"""What tests/attacks/harness.py printed: uid, level, words, results."""


def column_of(outcome: Outcome) -> str | None:
    """Which column an outcome fills; None if no column is about its level and user."""
    if not outcome["results"]:
        return None
    if outcome["level"] < NAMESPACED:
        below = {FILTERED: "user, no bubblewrap" if outcome["uid"] else None, NONE: "control"}
        return below.get(outcome["level"])
    contained = outcome["level"] == CONTAINED
    if outcome["uid"] == 0:
        return "root" if contained else None
    return "user with group" if contained else "user"


def run_all(*, control: bool) -> tuple[dict[str, Outcome], list[str]]:
    """Every column that this machine can fill, and why it cannot fill the others.

    control: also "control", the attacks that get through everywhere, without a sandbox; after the others, because
    its bombs count as the same user's, and RLIMIT_NPROC counts users.
    """
    harness = ["-m", "tests.attacks.harness"]
    root = os.geteuid() == 0
    one, two, three = (["-m", "tests.attacks.as_user", str(uid)] for uid in UIDS)
    free = [*([*one, "none"] if root else harness), "--level", "0"]
    rounds = [[harness], [[*harness, "--level", str(FILTERED)]]]  # of one user: the bombs of each count for the other
    if root:
        rounds = [[[*one, "none"], [*two, "none", "--level", str(FILTERED)], [*three, "group"], harness]]
    outcomes: dict[str, Outcome] = {}
    reasons = [] if root else ["these tests do not run as root"]
    for commands in [*rounds, *([[free]] if control else [])]:
        for answer in _run(commands):
            if isinstance(answer, str):
                reasons.append(answer)
            elif column := column_of(answer):
                outcomes[column] = answer
            else:
                reasons.append(answer["words"])
    return outcomes, reasons


def _run(commands: list[list[str]]) -> list[Outcome | str]:
    """What each harness found, or why this machine cannot run it. All at once: they wait more than they compute."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    answers: list[Outcome | str] = []
    for command, process in zip(commands, running, strict=True):
        out, error = process.communicate(timeout=SECONDS_MAX)
        if process.returncode == CANNOT:
            answers.append(error.strip())
        elif process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}: {error[-3000:]}")
        else:
            answers.append(json.loads(out.splitlines()[-1]))
    return answers


def names() -> list[tuple[str, str, str]]:
    """(attack, what blocked means, its harmless twin) of each row: the study's first, in its order of kinds."""
    own = len(ATTACKS) - (STUDIED - 6)
    studied = [(a.name, a.meaning, _twin(a.twin, a.twin_script)) for a in ATTACKS[:-own]]
    others = [(a.name, a.meaning, _twin(a.twin, a.twin_script)) for a in ATTACKS[-own:]]
    lies = [(s.name, s.meaning, "a true step said before is heard") for s in SPEECHES]
    return [*studied, *lies[:6], *others, *lies[6:]]


def _twin(*twins: Any) -> str:
    return "; a script also ".join((twin.__doc__ or "").strip() for twin in twins if twin is not None)


def cell(outcome: Outcome, name: str) -> str:
    """One word where both tiers agree."""
    graph, *script = (tier[name]["verdict"] for tier in map(outcome["results"].get, ("graph", "base")) if tier)
    return str(graph) if script in ([], [graph]) else f"{graph}; script: {script[0]}"


def rows(outcomes: dict[str, Outcome]) -> list[list[str]]:
    """The cells of each row; of a column that was not run, None stands as "?"."""
    return [
        [str(number), name, meaning, *(cell(outcomes[c], name) if c in outcomes else "?" for c in COLUMNS), twin]
        for number, (name, meaning, twin) in enumerate(names(), 1)
    ]


def summary(outcome: Outcome) -> str:
    """How many of how many, of each tier."""
    counts = []
    for tier, word in (("graph", "graph"), ("base", "script")):
        if found := outcome["results"].get(tier):
            counts.append(f"{word} {sum(v['verdict'] == 'blocked' for v in found.values())} of {len(found)}")
    return ", ".join(counts)


def section(outcomes: dict[str, Outcome]) -> str:
    """All between the markers."""
    lines = [BEGIN, f"Made by `{COMMAND}`; `tests/attacks` fails if it says anything else.", ""]
    lines += [f"- {COLUMNS[column]}: blocked {summary(outcomes[column])}" for column in COLUMNS]
    head = ["", "attack", "blocked means", *COLUMNS, "harmless twin, which works in the same cage"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(outcomes)]
    return "\n".join([*lines, END])


def main() -> None:
    """Run everything and write the section into docs/security.md."""
    outcomes, reasons = run_all(control=False)
    missing = [COLUMNS[column] for column in COLUMNS if column not in outcomes]
    if missing:
        raise SystemExit(f"this machine cannot be: {', '.join(missing)} ({'; '.join(reasons)})")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + section(outcomes) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
