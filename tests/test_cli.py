"""The command line: what people type, what they read, and what a program gets."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from peer.cli import _COMMANDS, cli
from peer.cli_markdown import markdown
from peer.cli_money import _MONEY_COLUMNS
from peer.cli_output import EXIT_CODES
from protocol.credits import credits_of, micro_of
from protocol.errors import IchibaError, MalformedRecord
from tests.cli_scene import (
    PEER,
    ROOT,
    SHOWN,
    STATUS,
    ichiba,
    lines,
)
from tests.fake_daemon import JOB, FakeDaemon


# --- every command -----------------------------------------------------------------------------------------
def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_an_example_and_speaks_json() -> None:
    for path, command in commands(cli):
        help_text = command.help or ""
        assert "\b" in help_text, f"{path} has no example"
        assert f"ichiba {' '.join(path)}" in help_text, f"the example of {path} does not call it"
        assert any("--json" in option.opts for option in command.params), path
        assert all(option.help for option in command.params if isinstance(option, click.Option)), path


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    ctx = click.Context(cli)
    for name, (_, text) in _COMMANDS.items():
        command = cli.get_command(ctx, name)
        assert command is not None
        assert (command.help or "").splitlines()[0] == text, name


def test_docs_cli_md_is_up_to_date() -> None:
    path = ROOT / "docs" / "cli.md"
    assert path.exists() and path.read_text() == markdown(cli), "run: ichiba --help-all-markdown > docs/cli.md"


def test_the_reference_names_every_command_option_and_exit_code() -> None:
    text = CliRunner().invoke(cli, ["--help-all-markdown"]).stdout
    for path, command in commands(cli):
        assert f"## ichiba {' '.join(path)}\n" in text
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0] in text
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text
    assert "--cheat" not in text.partition("## ichiba up\n")[2].partition("\n## ")[0]


def test_status_starts_without_torch_libp2p_trio_or_rich(home: Path) -> None:
    code = (
        "import sys\nfrom peer.cli import cli\n"
        f"try: cli.main(['--data', {str(home)!r}, 'status'])\nexcept SystemExit as end: assert end.code == 3, end\n"
        "heavy = {'torch', 'libp2p', 'trio', 'rich', 'numpy', 'httpx', 'nacl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


# --- errors ------------------------------------------------------------------------------------------------
def test_errors_say_what_why_and_next_on_stderr_and_as_an_object_under_json(home: Path) -> None:
    told = ichiba(home, "status")
    assert (told.exit_code, told.stdout) == (3, "")
    assert "error: no daemon serves" in told.stderr
    assert "next: ichiba up" in told.stderr
    told = ichiba(home, "status", "--json")
    error = json.loads(told.stderr)
    assert set(error) == {"schema", "code", "what", "why", "next", "exit_code"}
    assert (error["schema"], error["code"], error["exit_code"]) == ("ichiba.error/1", "daemon-not-running", 3)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["status"], 0),
        (["job", "ls"], 0),
        (["book"], 0),
        (["wallet", "--nonsense"], 2),
        (["nonsense"], 2),
        (["job"], 2),
        (["quote"], 2),
        (["submit", "nowhere.toml"], 2),
        (["job", "show", "ffff"], 4),
        (["job", "logs", "ffff"], 4),
        (["job", "get", "ffff"], 4),
        (["job", "cancel", "no-hex"], 2),
        (["receipts", "verify", "."], 4),
    ],
)
def test_each_outcome_has_its_exit_code(daemon: FakeDaemon, home: Path, words: list[str], code: int) -> None:
    for extra in ([], ["--json"]):
        told = ichiba(home, *words, *extra)
        assert told.exit_code == code, told.output
        assert code in EXIT_CODES
        if code and extra:
            assert json.loads(told.stderr)["exit_code"] == code or words == ["job"]


def test_an_empty_list_is_an_answer_and_not_an_error(daemon: FakeDaemon, home: Path) -> None:
    assert ichiba(home, "job", "ls").stdout == "jobs: none\n"
    assert ichiba(home, "job", "ls", "--json").stdout == ""


def test_a_reader_that_closes_early_gets_no_traceback(daemon: FakeDaemon, home: Path) -> None:
    command = [sys.executable, "-m", "peer.cli", "--data", str(home), "status", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert done.stderr == b""


# --- answers -----------------------------------------------------------------------------------------------
def test_status_shows_the_peer_to_people_and_programs(daemon: FakeDaemon, home: Path) -> None:
    told = ichiba(home, "status")
    assert PEER in told.stdout
    assert "1.50 credits" in told.stdout
    assert "solver, verifier" in told.stdout
    assert lines(ichiba(home, "status", "--json")) == [{"schema": "ichiba.status/1", **STATUS}]


def test_the_data_directory_may_come_first_last_or_from_the_environment(daemon: FakeDaemon, home: Path) -> None:
    assert ichiba(home, "status").exit_code == 0
    assert CliRunner().invoke(cli, ["status", "--data", str(home)]).exit_code == 0
    assert CliRunner().invoke(cli, ["status"], env={"ICHIBA_DATA": str(home)}).exit_code == 0


def test_the_book_says_why_this_peer_does_not_bid(daemon: FakeDaemon, home: Path) -> None:
    ask = {
        "peer": PEER, "roles": 1, "unit_price": 1000, "memory_bytes": 2 << 30, "sandbox": 4, "trust_ppm": 500_000,
        "operations_per_second": 10**9, "stake_micro": 5_000_000, "connected": True,
    }  # fmt: skip
    offer = {
        "offer": "ee" * 32, "submitter": PEER, "operations": 10**9, "unit_price_max": 1, "lock_micro": 1, "bids": [],
        "no_bid": {"code": "price", "why": "pays 0.000001, this peer asks 0.001"},
    }  # fmt: skip
    daemon.answers["book"] = lambda _: {"asks": [ask], "offers": [offer]}
    told = ichiba(home, "book")
    assert "pays 0.000001" in told.stdout
    assert "5.00" in told.stdout
    assert [line["schema"] for line in lines(ichiba(home, "book", "--json"))] == ["ichiba.ask/1", "ichiba.offer/1"]


def test_the_wallet_shows_credits_and_never_a_float(daemon: FakeDaemon, home: Path) -> None:
    row = {"name": PEER} | {f"{name}_micro": 1 for name in _MONEY_COLUMNS}
    daemon.answers["wallet"] = lambda arguments: {
        "peer": PEER, "free_micro": 1, "stake_micro": 10**15, "earned_unsettled_micro": 123_456_789, "total_micro": 0,
        "unbonding_micro": 0, "unbonding": [], "moves": [],
        "deals": [{"deal": "cd" * 32, "state": "running", "vouchers_micro": 5, "paid_micro": 0}],
        "table": {"rows": [row], "totals": row, "burned_micro": 0, "pool_micro": 7} if arguments["all"] else {},
    }  # fmt: skip
    told = ichiba(home, "wallet", "--all").stdout
    for amount in ("0.000001 credits", "1000000000.00 credits", "123.456789 credits", "0.000005", "0.000007"):
        assert amount in told
    assert lines(ichiba(home, "wallet", "--json"))[0]["free_micro"] == 1


def test_a_job_is_shown_with_its_deals_and_checks(daemon: FakeDaemon, home: Path) -> None:
    daemon.answers["jobs"] = lambda _: {"jobs": [SHOWN]}
    assert "60/60" in ichiba(home, "job", "ls").stdout
    told = ichiba(home, "job", "show", JOB[:6].upper())
    assert all(word in told.stdout for word in ("settled", "verifier", "1, 3", "0.06"))
    assert [line["schema"] for line in lines(ichiba(home, "job", "ls", "--json"))] == ["ichiba.job/1"]


def test_a_quote_says_who_is_left_out_by_the_limit(daemon: FakeDaemon, home: Path) -> None:
    daemon.answers["quote"] = lambda arguments: {
        "solvers": 3, "low_micro": 1, "median_micro": 2, "high_micro": 3, "fastest_seconds": 4.0, "too_dear": 2,
        "limit_for_all": 2100, "operations": arguments["operations"], "round_ms": 1000, "checks_included": False,
        "rungs": [{"unit_price_max": 1000, "solvers": 1, "free": 0, "connected": 1, "wait_ns": None,
                   "run_ns": 4 * 10**9, "work_micro": 5, "budget_micro": 5}],
    }  # fmt: skip
    told = ichiba(home, "quote", "--operations", "5000000000", "--price", "0.001", "--memory", "2G")
    assert told.exit_code == 0, told.output
    (row,) = [line.split() for line in told.stdout.splitlines() if line.strip().startswith("0.001 ")]
    assert row == ["0.001", "1", "0", "1", "?", "4.0", "s", "0.000005", "?"], "waiting is not known and says so"
    assert "leaves out 2 of them; 0.0021 would reach all" in told.stdout
    assert daemon.seen[-1][1] == {
        "operations": 5 * 10**9, "unit_price_max": 1000, "memory_bytes": 2 << 30, "sandbox": 2,
        "segments": 0, "operations_per_segment": 0, "device": "any", "device_memory_bytes": 0,
    }  # fmt: skip


# --- init and doctor ---------------------------------------------------------------------------------------
def test_init_makes_an_owners_directory_once_and_never_another_key(tmp_path: Path) -> None:
    data = tmp_path / "a" / "b"
    first = lines(ichiba(data, "init", "--json"))[0]
    assert (first["created"], first["network"]) == (True, "solo")
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "key").stat().st_mode) == 0o600
    key = (data / "key").read_bytes()
    second = lines(ichiba(data, "init", "--json"))[0]
    assert second == {**first, "created": False}
    assert (data / "key").read_bytes() == key
    (tmp_path / "other.toml").write_text('name = "other"\n')
    told = ichiba(data, "init", "--network", str(tmp_path / "other.toml"))
    assert told.exit_code == 2
    assert "another network" in told.stderr
    fresh = lines(ichiba(tmp_path / "c", "init", "--json", "--network", str(tmp_path / "other.toml")))[0]
    assert fresh["network"] == "other"


def test_doctor_names_what_is_wrong_with_the_command_that_mends_it(
    daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.lines = [
        {"what": "sandbox", "level": "2", "explanation": "proven", "fix": ""},
        {"what": "bubblewrap", "level": "2", "explanation": "missing", "fix": "apt-get install bubblewrap"},
        {"what": "peers", "level": "ok", "explanation": "3 peers are connected", "fix": ""},
    ]
    told = ichiba(home, "doctor")
    assert told.exit_code == 0
    assert "mend: apt-get install bubblewrap" in told.stdout
    (home / "key").chmod(0o644)
    told = ichiba(home, "doctor", "--json")
    assert told.exit_code == 1
    found = {line["what"]: line for line in lines(told)}
    assert found["key"]["level"] == "bad"
    assert found["key"]["fix"] == f"chmod 600 {home / 'key'}"
    assert {"data directory", "network file", "disk", "clock", "daemon", "port", "sandbox", "peers"} <= set(found)
    (home / "network.toml").write_text("name = 7")
    assert "network file" in ichiba(home, "doctor").stdout


# --- amounts -----------------------------------------------------------------------------------------------
def test_credits_read_back_as_they_are_written() -> None:
    for micro in (0, 1, 10, 999_999, 10**6, 1_500_000, 123_456_789, 10**14):
        assert micro_of(credits_of(micro)) == micro
    assert [credits_of(micro) for micro in (1_500_000, 1, -1, 0)] == ["1.50", "0.000001", "-0.000001", "0.00"]
    for text in ("", "1.", ".5", "-1", "1e3", "0.0000001", "01", "1,5", "١", "9" * 10, "nan"):
        with pytest.raises(MalformedRecord):
            micro_of(text)


# --- up ----------------------------------------------------------------------------------------------------
def test_up_takes_roles_prices_and_sizes_as_people_write_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peer.daemon

    seen = []

    async def run_daemon(config: Any, *, task_status: Any = None) -> None:
        seen.append(config)
        raise IchibaError("port 4747 is taken", next_step="choose another with --listen")

    monkeypatch.setattr(peer.daemon, "run_daemon", run_daemon)
    words = "--roles solver,verifier --price 0.0025 --memory 8G --peer a --peer b"
    told = ichiba(home, "up", *words.split())
    assert told.exit_code == 1
    assert "port 4747 is taken" in told.stderr
    config = seen[0]
    assert (config.roles, config.unit_price, config.memory_bytes) == (3, 2500, 8 << 30)
    assert (config.peers, config.mdns, config.slots) == (("a", "b"), True, 1)
    assert config.network_file == home / "network.toml"
    assert ichiba(home, "up", "--roles", "none", "--no-mdns").exit_code == 1
    assert (seen[1].roles, seen[1].mdns) == (0, False)
    for wrong in (["--roles", "boss"], ["--price", "1e-3"], ["--memory", "lots"], ["--slots", "0"]):
        assert ichiba(home, "up", *wrong).exit_code == 2
    assert len(seen) == 2


def test_up_without_init_says_so(tmp_path: Path) -> None:
    told = ichiba(tmp_path / "absent", "up")
    assert told.exit_code == 2
    assert "ichiba init" in told.stderr


@pytest.mark.swarm
def test_a_real_daemon_comes_up_answers_and_ends_on_sigterm(home: Path) -> None:
    command = [sys.executable, "-m", "peer.cli", "up", "--data", str(home), "--no-mdns"]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert "on network solo" in child.stdout.readline()
        assert "listening on /ip4/127.0.0.1/tcp/" in child.stdout.readline()
        assert child.stdout.readline().startswith("invite: ichiba1")
        status = ichiba(home, "status", "--json")
        second = ichiba(home, "up", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate()
    assert child.returncode == 0, err
    assert "Traceback" not in err
    assert lines(status)[0]["network"] == "solo"
    assert second.exit_code == 1  # one daemon for one data directory
    assert f"process {child.pid} uses the data directory" in second.stderr
    assert not (home / "control.sock").exists()
    assert ichiba(home, "status").exit_code == 3


def test_other_peers_words_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from peer.cli_output import Terminal, show_error

    terminal = Terminal(tmp_path, as_json=False)
    terminal.say("too \x1b]0;mine\x07 dear")
    terminal.note("\x9b2J")
    terminal.table("bids", ("why",), [("\x1b[2J",)])
    show_error(IchibaError("\x1b[1A", why="\x08", next_step="\r"), as_json=False)
    told = capsys.readouterr()
    assert "too \ufffd]0;mine\ufffd dear" in told.out
    assert not any(sign in told.out + told.err for sign in "\x1b\x07\x08\x9b\r")
