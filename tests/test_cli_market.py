"""The market on the command line: why, book, offers, trades, price suggest; what people read and what programs get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peer import cli_watch
from peer.cli_market import _asks, span
from peer.cli_output import Terminal
from peer.client import Client, DaemonNotRunning
from peer.simulator import Faults, Simulation
from tests.cli_scene import ichiba, lines, serve
from tests.fake_daemon import FakeDaemon
from tests.swarm_scenario import job_state, make_swarm, submit

VERBS = ("why", "book", "offers", "trades", "price", "quote", "status")


@pytest.fixture
def waiting() -> tuple[Simulation, str]:
    """Five peers and a job that pays too little."""
    simulation = make_swarm(21, Faults(loss=0, duplication=0, crash=0, delay_ns_max=20_000_000))
    simulation.run(seconds=3)
    job = submit(simulation, unit_price_max=900)
    simulation.run(seconds=4)
    return simulation, job


def test_why_a_job_waits_is_read_in_words_and_as_one_object(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str]
) -> None:
    simulation, job = waiting
    serve(daemon, simulation, "alice", verbs=VERBS)
    told = ichiba(home, "why", job[:8].upper())
    assert told.exit_code == 0, told.output
    assert "0 of 2 that are heard of could take it as it is" in told.stdout
    assert "ask more than the limit" in told.stdout
    assert "  raise the limit by 12 % (--price 0.001): 1 more" in told.stdout
    (line,) = lines(ichiba(home, "why", job[:8], "--json"))
    assert line["schema"] == "ichiba.why/1"
    assert line["advice"][0]["changes"]["unit_price_max"] == 1000
    (line,) = lines(ichiba(home, "why", "--json"))
    assert (line["about"], line["reasons"][0]["code"]) == ("here", "price")
    told = ichiba(home, "why", "me")
    assert "this peer has no role" in told.stdout


@pytest.mark.parametrize(("word", "code"), [("ffff", 4), ("no-hex", 2), ("a" * 65, 2)])
def test_why_of_no_job_says_so(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str], word: str, code: int
) -> None:
    serve(daemon, waiting[0], "alice", verbs=VERBS)
    told = ichiba(home, "why", word, "--json")
    assert told.exit_code == code
    assert json.loads(told.stderr)["what"]


def test_a_filter_reaches_the_daemon_and_the_title_says_how_much_is_left_out(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str]
) -> None:
    serve(daemon, waiting[0], "alice", verbs=VERBS)
    told = ichiba(home, "book", "role=solver price<0.002", "sandbox>=contained", "--sort", "-price", "--limit", "1")
    assert told.exit_code == 0, told.output
    assert daemon.seen[-1] == (
        "book", {"where": "role=solver price<0.002 sandbox>=contained", "sort": "-price", "limit": 1},
    )  # fmt: skip
    assert told.stdout.startswith("asks, 1 of 2 that match, 4 in all")
    assert "0.0011" in told.stdout
    assert "offers" not in told.stdout
    (line,) = lines(ichiba(home, "book", "role=solver", "price<=0.001", "--json"))
    assert (line["schema"], line["unit_price"]) == ("ichiba.ask/1", 1000)
    (line,) = lines(ichiba(home, "offers", "bids=0", "--json"))
    assert (line["schema"], line["unit_price_max"]) == ("ichiba.offer/1", 900)
    told = ichiba(home, "offers", "price>1")
    assert (told.exit_code, told.stdout) == (0, "offers, 0 of 0 that match, 1 in all: none\n")


@pytest.mark.parametrize("verb", ["book", "offers", "trades"])
def test_a_wrong_filter_or_key_names_the_keys_there_are(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str], verb: str
) -> None:
    told = ichiba(home, verb, "prise<1", "--json")
    error = json.loads(told.stderr)
    assert (told.exit_code, error["code"]) == (2, "bad-filter")
    assert "price" in error["why"]
    assert "character 1 " in error["what"]
    assert not [seen for seen in daemon.seen if seen[0] == verb], "it is refused before anybody is asked"
    serve(daemon, waiting[0], "alice", verbs=VERBS)
    told = ichiba(home, verb, "--sort", "colour")
    assert told.exit_code == 2
    assert "cannot sort" in told.stderr
    assert ichiba(home, verb, "--limit", "0").exit_code == 2


def test_a_wrong_filter_is_refused_without_a_daemon(home: Path) -> None:
    assert ichiba(home, "book", "prise<1").exit_code == 2
    assert ichiba(home, "book", "price<1").exit_code == 3


def test_trades_are_listed_with_what_they_say_of_the_price(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str]
) -> None:
    simulation, _ = waiting
    serve(daemon, simulation, "alice", verbs=VERBS)
    assert ichiba(home, "trades").stdout == "trades: none\n"
    (line,) = lines(ichiba(home, "trades", "--json"))
    assert (line["schema"], line["count"]) == ("ichiba.prints/1", 0)
    job = submit(simulation)
    simulation.run(seconds=600, until=lambda: job_state(simulation, job)["state"] == "running")
    simulation.run(seconds=2)
    told = ichiba(home, "trades", "mine=yes", "--limit", "5")
    assert told.exit_code == 0, told.output
    assert "0.001 credits per giga-operation, by volume" in told.stdout
    assert "1 trade of 1 pair of peers, counted as 1 (a pair once a day); too few to lean on" in told.stdout
    assert [line["schema"] for line in lines(ichiba(home, "trades", "--json"))] == ["ichiba.trade/1", "ichiba.prints/1"]


def test_a_price_is_suggested_with_what_it_rests_on(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str]
) -> None:
    simulation, _ = waiting
    serve(daemon, simulation, "alice", verbs=VERBS)
    told = ichiba(home, "price", "suggest")
    assert told.exit_code == 0, told.output
    assert (
        "a limit of 0.001 credits per giga-operation, from what solvers ask now: there are too few trades"
        in told.stdout
    )
    assert "sample: 0 trades of 0 pairs" in told.stdout
    serve(daemon, simulation, "carol", verbs=VERBS)
    told = ichiba(home, "price", "suggest", "--sell")
    assert "give --watts and --kwh" in told.stderr
    told = ichiba(home, "price", "suggest", "--sell", "--watts", "3600", "--kwh", "5")
    assert "ask 0.005 credits per giga-operation, what the electricity costs" in told.stdout
    (line,) = lines(ichiba(home, "price", "suggest", "--sell", "--watts", "3600", "--kwh", "5", "--json"))
    assert (line["schema"], line["floor"], line["basis"]) == ("ichiba.price/1", 5000, "power")
    told = ichiba(home, "price", "suggest", "--sell", "--watts", "300")
    assert told.exit_code == 2
    assert "--kwh" in told.stderr


def test_where_nothing_is_known_no_price_is_made_up(daemon: FakeDaemon, home: Path) -> None:
    simulation = make_swarm(22, Faults())
    serve(daemon, simulation, "alice", verbs=VERBS)
    told = ichiba(home, "price", "suggest")
    assert (told.exit_code, told.stdout.splitlines()[0]) == (
        0, "nothing to go by: no trade of the last week and no ask of another solver is known here",
    )  # fmt: skip


def test_a_quote_shows_price_against_waiting(daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str]) -> None:
    serve(daemon, waiting[0], "alice", verbs=VERBS)
    told = ichiba(home, "quote", "--operations", "5000000000", "--price", "0.00105")
    assert told.exit_code == 0, told.output
    table = told.stdout.partition("price against waiting")[2].splitlines()
    assert [row.split()[:4] for row in table[2:5]] == [
        ["0.001", "1", "1", "1"], ["0.00105", "1", "1", "1"], ["0.0011", "2", "2", "2"],
    ]  # fmt: skip
    (line,) = lines(ichiba(home, "quote", "--operations", "5000000000", "--json"))
    assert [rung["unit_price_max"] for rung in line["rungs"]] == [1000, 1100]


# --- live tables -------------------------------------------------------------------------------------------
def test_without_a_terminal_a_watched_table_is_printed_at_each_change_and_ctrl_c_is_no_error(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation, _ = waiting
    serve(daemon, simulation, "alice", verbs=VERBS)
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        simulation.run(seconds=1)
        if len(looks) == 3:
            submit(simulation, unit_price_max=800)
        if len(looks) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_watch, "pause", pause)
    told = ichiba(home, "offers", "price<1", "--watch")
    assert told.exit_code == 0, told.output
    assert told.stdout.count("no bid of this peer") == 2, (
        "once at first and once for the new offer, though ages change every time"
    )
    assert told.stdout.count("0.0009") == 2
    assert told.stdout.count("0.0008") == 1
    assert len(looks) == 5


def test_on_a_terminal_a_watched_table_is_drawn_in_place(
    daemon: FakeDaemon, home: Path, waiting: tuple[Simulation, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    simulation, _ = waiting
    screens = []

    def pause(_: float) -> None:
        screens.append(1)
        if len(screens) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_watch, "pause", pause)
    monkeypatch.setattr(cli_watch, "_on_terminal", lambda: True)
    terminal = Terminal(home, as_json=False)
    cli_watch.watch(
        terminal,
        lambda: simulation.command("alice", "book", {}).result,
        lambda found: _asks(terminal, found),
        watching=True,
    )
    assert "0.0011" in capsys.readouterr().out
    assert len(screens) == 2


def test_a_watched_table_whose_daemon_goes_away_ends_with_its_error(
    daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise DaemonNotRunning("no daemon serves", next_step="ichiba up")

    daemon.answers["offers"] = lambda _: {"offers": []}
    monkeypatch.setattr(cli_watch, "pause", lambda _: monkeypatch.setattr(Client, "offers", gone))
    told = ichiba(home, "offers", "--watch")
    assert (told.exit_code, told.stdout) == (3, "offers: none\n")


def test_spans_are_short_and_what_is_not_known_is_a_question_mark() -> None:
    seconds = (0, 1.5, 59, 150, 3 * 3600, 5 * 86_400)
    assert [span(int(s * 10**9)) for s in seconds] == ["0.0 s", "1.5 s", "59 s", "2 min", "3 h", "5 d"]
    assert span(None) == "?"
