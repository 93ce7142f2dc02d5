"""A wallet in one file: what is restored is what was backed up, and nothing damaged, foreign or living is touched."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from market import ledger as money
from market.ledger import Account
from peer import key_file, wallet_file
from peer.home import Home, HomeProblem
from peer.key_file import WrongPassphrase
from peer.restored import RESTORED_KEY, RESTORED_TABLE
from peer.store import Batch, Event, Store
from peer.store_schema import DATABASE_NAME, AlreadyRunning
from peer.wallet_file import BadWallet, backup, restore
from protocol import params
from protocol.codec import blake
from protocol.errors import CorruptStore, NotFound
from protocol.keys import SigningKey
from tests.cli_scene import ichiba, lines

WORDS = "correct horse battery"


def unmoved(_done: int, _total: int) -> None:
    """Nobody watches."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file.seal_seed, "__kwdefaults__", {"passes": 1, "memory": 8192})
    monkeypatch.setattr(params, "WALLET_CHUNK_BYTES", 10_000)


def living(path: Path, passphrase: str | None = None) -> tuple[Home, Store]:
    """A data directory whose daemon runs: its store is open and has committed."""
    home = Home(path)
    me = home.create(passphrase=passphrase).public
    store = Store.open(path, home.network().id, me)
    funds = money.deposit(blake("test/wallet", b"deposit"), me, 1_000)
    store.commit([Batch((("vouchers", b"v", b"secret words" * 2_000),), (funds,), (Event("job", 1, "line"),))])
    return home, store


@pytest.mark.parametrize("word", [None, WORDS])
def test_a_wallet_comes_back_as_it_was_taken_from_a_running_daemon(tmp_path: Path, word: str | None) -> None:
    home, store = living(tmp_path / "a", word)
    file = tmp_path / "wallet"
    with store:
        header = backup(home, file, passphrase=word, moved=unmoved)
        store.commit([Batch((("vouchers", b"later", b"x"),))])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (b"secret words" in file.read_bytes()) == (word is None), "a sealed key seals all of the wallet"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "wallet"]
    other = Home(tmp_path / "b")
    assert restore(other, file, passphrase=word, moved=unmoved) == (header, None)
    assert other.key_text() == home.key_text()
    assert other.network() == home.network()
    me = SigningKey.from_seed(other.seed(word)).public
    with Store.open(other.path, header.network, me) as again:
        assert again.ledger().balance_micro(Account(me, "free")) == 1_000
        assert [key for key, _ in again.rows("vouchers")] == [b"v"]
        assert again.get(RESTORED_TABLE, RESTORED_KEY) is not None, "it listens before it signs"
    assert sorted(f.name for f in other.path.iterdir()) == ["ichiba.db", "ichiba.lock", "key", "network.toml"]


def test_a_living_wallet_is_set_aside_only_on_request_and_never_under_a_daemon(tmp_path: Path) -> None:
    home, store = living(tmp_path / "a")
    file = tmp_path / "wallet"
    with store:
        backup(home, file, passphrase=None, moved=unmoved)
        with pytest.raises(BadWallet, match="exists"):
            backup(home, file, passphrase=None, moved=unmoved)
        with pytest.raises(AlreadyRunning):
            restore(home, file, passphrase=None, force=True, moved=unmoved)
    key = home.key_text()
    with pytest.raises(HomeProblem, match="lives in") as refused:
        restore(home, file, passphrase=None, moved=unmoved)
    assert "--force" in refused.value.next_step
    _, aside = restore(home, file, passphrase=None, force=True, alone=True, moved=unmoved)
    assert aside == home.path / "replaced-1"
    assert {f.name for f in aside.iterdir()} == {"ichiba.db", "key", "network.toml"}
    assert home.key_text() == key
    with Store.open(home.path, home.network().id, SigningKey.from_seed(home.seed()).public) as again:
        assert again.get(RESTORED_TABLE, RESTORED_KEY) is None


@pytest.mark.parametrize("word", [None, WORDS])
def test_no_changed_or_cut_byte_of_a_backup_is_believed(
    tmp_path: Path, word: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, store = living(tmp_path / "a", word)
    file, other = tmp_path / "wallet", Home(tmp_path / "b")
    with store:
        backup(home, file, passphrase=word, moved=unmoved)
    data = file.read_bytes()
    for changed in (
        b"", data[:10], data[:100], data[:-1], data + b"x", b"X" + data[1:],
        data[:16] + b"\xff\xff\xff\xff" + data[20:], *(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        for at in range(20, len(data), 4_999)),
    ):  # fmt: skip
        file.write_bytes(changed)
        with pytest.raises(BadWallet):
            restore(other, file, passphrase=word, moved=unmoved)
        assert not other.path.exists() or not list(other.path.glob("key"))
    with pytest.raises(NotFound):
        restore(other, tmp_path / "none", passphrase=None, moved=unmoved)
    if word is not None:  # whoever changes it can also make its checksum right
        start = len(data) // 2
        forged = data[:start] + bytes([data[start] ^ 1]) + data[start + 1 : -32]
        import hashlib

        file.write_bytes(forged + hashlib.blake2b(forged, digest_size=32).digest())
        with pytest.raises(BadWallet, match="chunk"):
            restore(other, file, passphrase=word, moved=unmoved)
        file.write_bytes(data)
        with pytest.raises(WrongPassphrase):
            restore(other, file, passphrase="another word", moved=unmoved)


def test_a_damaged_store_is_not_backed_up_and_leaves_no_file(tmp_path: Path) -> None:
    home, store = living(tmp_path / "a")
    store.close()
    path = home.path / DATABASE_NAME
    data = path.read_bytes()
    at = data.index(b"secret words")
    path.write_bytes(data[:at] + b"S" + data[at + 1 :])
    with pytest.raises(CorruptStore):
        backup(home, tmp_path / "wallet", passphrase=None, moved=unmoved)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


def test_a_stop_at_any_step_of_restoring_leaves_no_wallet_that_starts_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each rename: the next restoring finishes, and until then no daemon finds a key with no store."""
    home, store = living(tmp_path / "a")
    file = tmp_path / "wallet"
    with store:
        backup(home, file, passphrase=None, moved=unmoved)

    class Killed(BaseException):
        """As if the process ended here."""

    renamed = Path.rename
    for die_at in range(1, 8):
        calls = 0

        def rename(self: Path, target: Path, die_at: int = die_at) -> Path:
            nonlocal calls
            if target.parent in (home.path, home.path / f"replaced-{die_at}"):
                calls += 1
                if calls == die_at:
                    raise Killed
            return renamed(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        try:
            restore(home, file, passphrase=None, force=True, alone=True, moved=unmoved)
        except Killed:
            pass
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(params, "WALLET_CHUNK_BYTES", 10_000)
        assert (home.path / DATABASE_NAME).exists() or not home.key_file.exists()
        kept = [home.path, *home.path.glob("replaced-*")]
        assert any((folder / DATABASE_NAME).exists() for folder in kept)
        assert any((folder / "key").exists() for folder in kept)
    restore(home, file, passphrase=None, force=True, alone=True, moved=unmoved)
    with Store.open(home.path, home.network().id, SigningKey.from_seed(home.seed()).public) as again:
        assert again.ledger().total_micro() == 1_000


def test_the_commands_tell_what_they_did(tmp_path: Path) -> None:
    home, store = living(tmp_path / "a")
    file = tmp_path / "wallet"
    with store:
        (told,) = lines(ichiba(home.path, "wallet", "backup", str(file), "--json"))
    assert (told["sealed"], told["file"]) == (False, str(file))
    restored = ichiba(tmp_path / "b", "wallet", "restore", str(file))
    assert restored.exit_code == 0
    assert "signs nothing until it has heard" in restored.stdout
    again = ichiba(tmp_path / "b", "wallet", "restore", str(file))
    assert (again.exit_code, "lives in" in again.stderr) == (2, True)
    assert wallet_file.describe(wallet_file.read_header(file))["peer"] == told["peer"]
