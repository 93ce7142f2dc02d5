"""The data directory of one peer: its key, its network file, its control socket. Owner-only, never overwritten."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from peer.key_file import is_sealed, open_seed, replace_file, seal_seed
from protocol.errors import IchibaError
from protocol.keys import SigningKey
from protocol.network import Network, dump, load

__all__ = ["Home", "HomeProblem"]

KEY_FILE_BYTES_MAX = 4096  # a sealed one has 400


class HomeProblem(IchibaError):
    """The data directory is missing something, or others may read it."""

    code = "data-directory"
    exit_code = 2


@dataclass(frozen=True)
class Home:
    """Paths and files under one data directory. Nothing is created but by `create`."""

    path: Path

    @property
    def key_file(self) -> Path:
        """The peer's 32-byte Ed25519 seed, in hex or sealed (peer/key_file.py), mode 0600."""
        return self.path / "key"

    @property
    def network_file(self) -> Path:
        """The network this peer is on."""
        return self.path / "network.toml"

    @property
    def control_socket(self) -> Path:
        """Where the daemon listens for its owner."""
        return self.path / "control.sock"

    def create(
        self, network_text: str | None = None, *, seed: bytes | None = None, passphrase: str | None = None
    ) -> SigningKey:
        """Make the directory, the key (sealed, if a passphrase is given) and the network file; what exists stays.

        Raises HomeProblem if the directory holds another network file than the given one, or cannot be made.
        """
        network = load(network_text) if network_text is not None else None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            if not self.key_file.exists():
                fresh = seed or secrets.token_bytes(32)
                replace_file(self.key_file, fresh.hex() if passphrase is None else seal_seed(fresh, passphrase))
            if not self.network_file.exists():
                self.network_file.write_text(dump(network) if network is not None else SOLO)
        except OSError as error:
            raise HomeProblem(f"{self.path} cannot be made: {error.strerror}") from None
        if network is not None and self.network(self.network_file).id != network.id:
            raise HomeProblem(
                f"{self.network_file} is of another network",
                next_step="use another --data directory for another network",
            )
        return SigningKey.from_seed(self.seed(passphrase))

    def key_text(self) -> str:
        """The key file as it stands. Raises HomeProblem if it is missing or readable by others."""
        try:
            mode = self.key_file.stat().st_mode & 0o777
            text = self.key_file.read_bytes()[: KEY_FILE_BYTES_MAX + 1].decode("ascii", "replace").strip()
        except OSError as error:
            raise HomeProblem(f"no key in {self.path}: {error.strerror}", next_step="run `ichiba init`") from None
        if mode & 0o077:
            raise HomeProblem(
                f"{self.key_file} can be read by others (mode {mode:o})", next_step=f"chmod 600 {self.key_file}"
            )
        return text

    @property
    def protected(self) -> bool:
        """Whether the key is sealed by a passphrase. Raises HomeProblem as `key_text`."""
        return is_sealed(self.key_text())

    def seed(self, passphrase: str | None = None) -> bytes:
        """The peer's seed. Raises HomeProblem if it is missing, damaged, readable by others, or sealed and no
        passphrase is given; WrongPassphrase."""
        text = self.key_text()
        if passphrase is None and is_sealed(text):
            raise HomeProblem(
                f"{self.key_file} is sealed by a passphrase",
                next_step="run it on a terminal, set ICHIBA_PASSPHRASE or give --passphrase-file FILE",
            )
        return open_seed(text, passphrase or "")

    def write_key(self, text: str) -> None:
        """Replace the key file, at once or not at all. Raises HomeProblem."""
        try:
            replace_file(self.key_file, text)
        except OSError as error:
            raise HomeProblem(f"{self.key_file} cannot be written: {error.strerror}") from None

    def network(self, path: Path | None = None) -> Network:
        """The network file. Raises HomeProblem, BadNetworkFile."""
        file = path or self.network_file
        try:
            return load(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise HomeProblem(f"{file} cannot be read: {error}", next_step="run `ichiba init`") from None


SOLO = 'name = "solo"\n'
