"""The key file: plain by default, sealed on request, replaced at once or not at all, every problem a typed error."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from peer import key_file
from peer.home import Home, HomeProblem
from peer.key_file import KeyProblem, WrongPassphrase, open_seed, replace_file, seal_seed
from protocol import params
from tests.cli_scene import ichiba, lines, made_home

SEED = bytes(range(32))
WORDS = "correct horse battery"
QUICK = {"passes": 1, "memory": 8192}  # argon2id at its least: what the limits cost is not under test


def test_what_was_sealed_opens_with_its_passphrase_and_no_other() -> None:
    text = seal_seed(SEED, WORDS, **QUICK)
    assert SEED.hex() not in text
    assert open_seed(text, WORDS) == SEED
    assert seal_seed(SEED, WORDS, **QUICK) != text, "a new salt and nonce each time"
    for wrong in ("", "correct horse batterz", WORDS + " ", "x" * 5_000):
        with pytest.raises(WrongPassphrase) as refused:
            open_seed(text, wrong)
        assert refused.value.next_step


def test_a_passphrase_is_the_same_however_its_letters_were_composed() -> None:
    assert open_seed(seal_seed(SEED, "caf\u00e9 au lait", **QUICK), "cafe\u0301 au lait") == SEED


def test_the_default_limits_are_the_moderate_ones_of_libsodium() -> None:
    import nacl.pwhash.argon2id as argon2id

    assert (params.KEY_PASSES, params.KEY_MEMORY_BYTES) == (argon2id.OPSLIMIT_MODERATE, argon2id.MEMLIMIT_MODERATE)


@pytest.mark.parametrize(
    "change",
    [
        {"memory": 2**40}, {"passes": 10**9}, {"passes": 0}, {"kdf": "scrypt"}, {"ichiba_key": 2}, {"salt": "00"},
        {"sealed": "00" * 71}, {"more": 1}, {"peer": "12D3KooWsomebodyelse"},
    ],
)  # fmt: skip
def test_a_changed_file_is_refused_before_it_costs_anything(change: dict[str, object]) -> None:
    fields = json.loads(seal_seed(SEED, WORDS, **QUICK)) | change
    with pytest.raises(KeyProblem):
        open_seed(json.dumps(fields), WORDS)


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "{", "{}", "{" * 3_000, SEED.hex()[:-1], SEED.hex() + "00"])
def test_rubbish_is_a_typed_error(text: str) -> None:
    with pytest.raises(KeyProblem):
        open_seed(text, WORDS)


def test_a_short_passphrase_seals_nothing() -> None:
    with pytest.raises(KeyProblem, match="7 characters"):
        seal_seed(SEED, "seven77", **QUICK)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_crash_while_the_key_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "key"
    replace_file(path, "old")

    class Killed(BaseException):
        """No `except` of ours may catch it: as if the process ended here."""

    def die(*_: object) -> None:
        raise Killed

    target = os if failing == "fsync" else Path
    monkeypatch.setattr(target, failing, die)
    with pytest.raises(Killed):
        replace_file(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old\n"
    replace_file(path, "new")  # what the dead one left is in nobody's way
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file.seal_seed, "__kwdefaults__", QUICK)


def test_a_key_is_protected_and_unprotected_by_commands(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, secret = Home(made_home(tmp_path / "h")), tmp_path / "secret"
    seed = home.seed()
    secret.write_text(WORDS + "\nsecond line")
    assert ichiba(home.path, "key", "protect", "--passphrase-file", str(secret)).exit_code == 0
    assert seed.hex() not in home.key_text()
    assert home.seed(WORDS) == seed
    (told,) = lines(ichiba(home.path, "key", "show", "--json"))
    assert told["protected"] is True
    with pytest.raises(HomeProblem, match="ICHIBA_PASSPHRASE"):
        home.seed()
    again = ichiba(home.path, "key", "protect", "--passphrase-file", str(secret))
    assert (again.exit_code, "sealed already" in again.stderr) == (2, True)
    nobody = ichiba(home.path, "key", "unprotect")
    assert (nobody.exit_code, "no terminal" in nobody.stderr) == (2, True)
    monkeypatch.setenv("ICHIBA_PASSPHRASE", "another one")
    wrong = ichiba(home.path, "key", "unprotect", "--json")
    assert (wrong.exit_code, json.loads(wrong.stderr)["code"]) == (2, "wrong-passphrase")
    up = ichiba(home.path, "up")
    assert (up.exit_code, "does not open the key" in up.stderr, "Traceback" in up.stderr) == (2, True, False)
    monkeypatch.setenv("ICHIBA_PASSPHRASE", WORDS)
    assert ichiba(home.path, "key", "unprotect").exit_code == 0
    assert home.seed() == seed


def test_init_seals_a_new_key_and_never_an_old_one(tmp_path: Path, quick: None) -> None:
    secret = tmp_path / "secret"
    secret.write_text(WORDS)
    made = ichiba(tmp_path / "h", "init", "--passphrase", "--passphrase-file", str(secret), "--json")
    assert made.exit_code == 0
    text = Home(tmp_path / "h").key_text()
    assert key_file.is_sealed(text)
    kept = ichiba(tmp_path / "h", "init", "--passphrase-file", str(secret), "--json")
    assert (lines(kept)[0]["created"], lines(kept)[0]["peer"]) == (False, lines(made)[0]["peer"])
    assert Home(tmp_path / "h").key_text() == text
