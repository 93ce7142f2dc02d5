"""What the command line's tests share: answers of a daemon, a data directory, and a way to type a command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner, Result

from peer.cli import cli
from peer.client import CommandRefused
from tests.fake_daemon import JOB, FakeDaemon, running

if TYPE_CHECKING:
    from peer.simulator import Simulation

ROOT = Path(__file__).resolve().parent.parent
PEER = "12D3KooWGC9253ES1rnmjbyBGj7CEVEEqtkq13RN4DgqLixKLZao"

STATUS = {
    "peer": PEER, "network": "solo", "network_id": "f2" * 32, "peers": [], "roles": 3, "sandbox": 4,
    "unit_price": 1000, "operations_per_second": 10**9, "offers_seen": 1, "asks_seen": 2, "jobs_open": 0,
    "deals_active": 0, "free_micro": 1_500_000, "stake_micro": 1, "settlement_records": 0, "clock_ns": 1,
    "addresses": [f"/ip4/192.0.2.1/tcp/4747/p2p/{PEER}"],
}  # fmt: skip
DEAL = {
    "deal": "cd" * 32, "solver": PEER, "state": "settled", "segments": [0, 6], "receipts": 6, "vouchers_micro": 60_000,
    "channel_micro": 90_000, "lock_micro": 300_000, "paid_micro": 60_000, "drawn": [1, 3], "note": "",
    "checks": [{"checker": PEER, "role": "verifier", "segments": [1, 3], "state": "right"}],
}  # fmt: skip
ACCUSED = {**DEAL, "checks": [{"checker": PEER, "role": "verifier", "segments": [1], "state": "wrong"}]}
SHOWN = {
    "job": JOB, "name": "line", "state": "done", "stage": "", "reason": "", "segments": 6, "segments_done": 6,
    "steps": 60, "steps_done": 60, "budget_micro": 1_000_000, "spent_micro": 90_000, "paid_micro": 60_000,
    "slashed_micro": 0, "culprits": [], "retried": 0, "created_ns": 1, "ended_ns": 2, "final_root": "11" * 32,
    "checkpoint": "22" * 32, "deals": [DEAL],
}  # fmt: skip


DONE = {"kind": "done", "reason": "", "final_root": "11" * 32, "checkpoint": "22" * 32}
STEPS = [{"kind": "step", "deal": "cd" * 32, "step": step, "loss": 1 / (1 + step)} for step in range(60)]


def serve(daemon: FakeDaemon, simulation: Simulation, name: str, *, verbs: Iterable[str]) -> None:
    """Let a simulated node answer behind the control socket: its own words, not a copy of them."""

    def answer(verb: str) -> Any:
        def ask(arguments: dict[str, Any]) -> dict[str, Any]:
            reply = simulation.command(name, verb, arguments)
            if reply.error is not None:
                raise CommandRefused(reply.error)
            return reply.result

        return ask

    daemon.answers |= {verb: answer(verb) for verb in verbs}


def ichiba(data: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--data", str(data), *words])


def lines(result: Result) -> list[dict[str, Any]]:
    """The JSON lines of an answer; each must name its schema."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(str(line["schema"]).startswith("ichiba.") for line in found)
    return found


def made_home(path: Path) -> Path:
    """A data directory after `ichiba init`."""
    assert ichiba(path, "init").exit_code == 0
    return path


@contextmanager
def answering(home: Path) -> Iterator[FakeDaemon]:
    """A fake daemon of `home` with a finished job and an empty market."""

    def prepare(fake: FakeDaemon) -> None:
        known = fake.answers["job"]
        fake.answers |= {
            "status": lambda _: STATUS,
            "jobs": lambda _: {"jobs": []},
            "book": lambda _: {"asks": [], "offers": []},
            "job": lambda arguments: {**SHOWN, "job": known(arguments)["job"]},
            "cancel": lambda arguments: {**SHOWN, "state": "cancelled", "job": known(arguments)["job"]},
        }

    with running(home, prepare) as fake:
        yield fake


def say(daemon: FakeDaemon, *events: dict[str, Any]) -> None:
    """Events that have happened."""
    for number, event in enumerate(events, 1):
        daemon.tell(number, **event)
