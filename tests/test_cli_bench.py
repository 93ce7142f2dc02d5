"""`ichiba bench` as people and programs meet it: checking, listing, challenging, and a card from a peer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from peer.client import Client
from peer.home import Home
from protocol.bench_card import card_file, reference_result
from protocol.keys import peer_name
from tests.bench_scene import CHALLENGER, PROVER, SECOND, card, challenge, challenge_id, witnessed
from tests.cli_scene import PEER, STATUS, ichiba, lines, say
from tests.fake_daemon import FakeDaemon


def made_card(home: Path, **changes: Any) -> tuple[bytes, bytes]:
    """(envelope, evidence) of a card made now, on the network of `home`."""
    now = time.time_ns()
    terms = challenge(network=Home(home).network().id, created_ns=now, expires_ns=now + 60 * SECOND)
    evidence = reference_result(terms, challenge_id(terms))
    times = {"created_ns": now, "expires_ns": now + 600 * SECOND}
    return witnessed(card(terms, evidence, **times | changes)), evidence


def test_a_card_file_is_checked_without_a_daemon(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "card"
    file.write_bytes(card_file(*made_card(home)))
    told = ichiba(home, "bench", "--check", str(file))
    assert (told.exit_code, told.stderr) == (0, "")
    assert "right: every product" in told.stdout
    assert peer_name(CHALLENGER.public) in told.stdout
    (found,) = lines(ichiba(home, "bench", "--check", str(file), "--json"))
    assert (found["peer"], found["timed"]) == (peer_name(PROVER.public), "witnessed")
    assert found["check_ms"] > 0


def test_a_card_file_altered_at_one_element_is_refused_with_words(home: Path, tmp_path: Path) -> None:
    envelope, evidence = made_card(home)
    file = tmp_path / "card"
    file.write_bytes(card_file(envelope, evidence[:-1] + bytes([(evidence[-1] + 1) % 100])))
    told = ichiba(home, "bench", "--check", str(file), "--json")
    assert told.exit_code == 1
    assert json.loads(told.stderr)["code"] == "verification-failed"


def test_an_expired_card_says_what_to_do(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "card"
    then = time.time_ns() - 3600 * SECOND
    file.write_bytes(card_file(*made_card(home, created_ns=then, expires_ns=then + 60 * SECOND)))
    told = ichiba(home, "bench", "--check", str(file))
    assert told.exit_code == 1
    assert "expired" in told.stderr
    assert "ichiba bench" in told.stderr


def test_any_other_file_is_no_card(home: Path) -> None:
    told = ichiba(home, "bench", "--check", str(home / "network.toml"))
    assert told.exit_code == 1
    assert "error:" in told.stderr


def test_options_that_exclude_each_other_are_a_usage_error(home: Path) -> None:
    assert ichiba(home, "bench", "--list", "--challenge").exit_code == 2
    assert ichiba(home, "bench", "--alone", "--with", PEER).exit_code == 2


def test_a_card_from_a_peer_is_followed_fetched_and_kept(home: Path, daemon: FakeDaemon) -> None:
    envelope, evidence = made_card(home)
    file = home / "evidence"
    file.write_bytes(evidence)
    blob = Client(home).put_blob(file)
    daemon.answers |= {
        "status": lambda _: {**STATUS, "peers": [PEER]},
        "bench": lambda _: {"challenger": PEER, "memory_bytes": 1},
        "cards": lambda _: {"cards": [], "own": envelope.hex(), "own_evidence": blob.hex()},
    }
    past = len(daemon.past)
    known = daemon.answers["bench"]

    def begin(arguments: dict[str, Any]) -> dict[str, Any]:
        for number, stage in enumerate(("warm", "chain", "memory", "probe"), past + 1):
            daemon.tell(number, kind="bench", job=None, stage=stage)
        daemon.tell(past + 9, kind="bench-card", job=None)
        return known(arguments)

    daemon.answers["bench"] = begin
    told = ichiba(home, "bench")
    assert told.exit_code == 0, told.stderr
    assert "multiplying the chain" in told.stderr
    assert f"by {peer_name(CHALLENGER.public)}" in told.stdout
    assert (home / "bench-card").read_bytes() == card_file(envelope, evidence)
    assert ichiba(home, "bench", "--check", str(home / "bench-card")).exit_code == 0


def test_a_refusal_is_an_error_with_its_cause(home: Path, daemon: FakeDaemon) -> None:
    def begin(_: dict[str, Any]) -> dict[str, Any]:
        say(daemon, {"kind": "bench-refused", "code": "late", "why": "no answer in the window", "job": None})
        return {"challenger": PEER, "memory_bytes": 1}

    daemon.answers |= {"status": lambda _: {**STATUS, "peers": [PEER]}, "bench": begin}
    told = ichiba(home, "bench", "--with", PEER)
    assert told.exit_code == 1
    assert "no answer in the window" in told.stderr


def test_challenges_and_cards_are_told(home: Path, daemon: FakeDaemon) -> None:
    row = {
        "peer": PEER, "timed": "by this peer", "operations_per_second": 5 * 10**9, "proven_memory_bytes": 2**20,
        "device": "a device", "created_ns": time.time_ns(),
    }  # fmt: skip
    daemon.answers |= {"challenge": lambda _: {"invited": [PEER]}, "cards": lambda _: {"cards": [row]}}
    assert "1 peers are invited" in ichiba(home, "bench", "--challenge").stdout
    assert "a device" in ichiba(home, "bench", "--list").stdout
    assert lines(ichiba(home, "bench", "--list", "--json"))[0]["peer"] == PEER
