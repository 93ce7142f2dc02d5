"""The attacks of the catalogue are stopped, for every kind of owner that this machine can be, and the page says so."""

from __future__ import annotations

import pytest

from tests.attacks.catalogue import ATTACKS, SPEECHES, STUDIED
from tests.attacks.table import (
    BEGIN,
    COLUMNS,
    COMMAND,
    CONTAINED,
    END,
    NAMESPACED,
    PAGE,
    Outcome,
    names,
    rows,
    run_all,
    summary,
)

Runs = tuple[dict[str, Outcome], list[str]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """All of them, run once."""
    return run_all(control=True)


def outcome_of(runs: Runs, column: str) -> Outcome:
    outcomes, reasons = runs
    if column not in outcomes:
        pytest.skip(f"not {COLUMNS.get(column, column)}: {'; '.join(reasons) or 'not tried'}")
    return outcomes[column]


def test_the_catalogue_has_the_studys_fifty_attacks_and_more_of_our_own() -> None:
    found = [name for name, _, _ in names()]
    assert len(found) == len(set(found)) == len(ATTACKS) + len(SPEECHES)
    assert STUDIED == 50
    assert len(found) >= STUDIED + 10


@pytest.mark.parametrize("tier", ["graph", "base"])
@pytest.mark.parametrize("column", COLUMNS)
def test_attacks_are_stopped_and_their_twins_work(runs: Runs, column: str, tier: str) -> None:
    outcome = outcome_of(runs, column)
    if tier == "base" and outcome["level"] < NAMESPACED:
        assert tier not in outcome["results"], "no script runs here"
        return
    results = outcome["results"][tier]
    assert set(results) == {name for name, _, _ in names()}
    assert {name: v["twin"] for name, v in results.items() if v["twin"]} == {}, "blocked must not mean broken"
    # What only a control group stops is let through to scripts below CONTAINED, and no script runs there.
    allowed = {a.name for a in ATTACKS if a.group and tier == "base" and outcome["level"] < CONTAINED}
    through = {name: v["detail"] for name, v in results.items() if v["verdict"] != "blocked"}
    assert {name: words for name, words in through.items() if name not in allowed} == {}


def test_without_a_sandbox_they_get_through(runs: Runs) -> None:
    """An attack that nothing stops and that does nothing would prove nothing."""
    results = outcome_of(runs, "control")["results"]["base"]
    assert set(results) == {a.name for a in ATTACKS if a.free}
    assert {name: v["detail"] for name, v in results.items() if v["verdict"] != "open"} == {}
    assert len(results) >= 25


def test_the_table_in_the_page_is_what_was_measured(runs: Runs) -> None:
    outcomes = {column: outcome for column, outcome in runs[0].items() if column in COLUMNS}
    if not outcomes:
        pytest.skip("; ".join(runs[1]))
    text = PAGE.read_text()
    section = text.partition(BEGIN)[2].partition(END)[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    measured = rows(outcomes)
    assert len(table) == len(measured), f"run as root: {COMMAND}"
    for written, found in zip(table, measured, strict=True):
        known = [place for place, word in enumerate(found) if word != "?"]
        assert [written[p] for p in known] == [found[p] for p in known], f"run as root: {COMMAND}"
    for column, outcome in outcomes.items():
        assert f"- {COLUMNS[column]}: blocked {summary(outcome)}\n" in section, f"run as root: {COMMAND}"
