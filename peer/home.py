"""The data directory of one peer: its key, its network file, its control socket. Owner-only, never overwritten."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import IchibaError
from protocol.keys import SigningKey
from protocol.network import Network, dump, load

__all__ = ["Home", "HomeProblem"]


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
        """The peer's 32-byte Ed25519 seed, in hex, mode 0600."""
        return self.path / "key"

    @property
    def network_file(self) -> Path:
        """The network this peer is on."""
        return self.path / "network.toml"

    @property
    def control_socket(self) -> Path:
        """Where the daemon listens for its owner."""
        return self.path / "control.sock"

    def create(self, network_text: str | None = None, *, seed: bytes | None = None) -> SigningKey:
        """Make the directory, the key and the network file; what exists stays as it is.

        Raises HomeProblem if the directory holds another network file than the given one, or cannot be made.
        """
        network = load(network_text) if network_text is not None else None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            if not self.key_file.exists():
                self._write_secret((seed or secrets.token_bytes(32)).hex())
            if not self.network_file.exists():
                self.network_file.write_text(dump(network) if network is not None else SOLO)
        except OSError as error:
            raise HomeProblem(f"{self.path} cannot be made: {error.strerror}") from None
        if network is not None and self.network(self.network_file).id != network.id:
            raise HomeProblem(
                f"{self.network_file} is of another network",
                next_step="use another --data directory for another network",
            )
        return SigningKey.from_seed(self.seed())

    def _write_secret(self, text: str) -> None:
        part = self.key_file.with_suffix(".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, text.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.rename(self.key_file)

    def seed(self) -> bytes:
        """The peer's seed. Raises HomeProblem if it is missing, damaged, or readable by others."""
        try:
            mode = self.key_file.stat().st_mode & 0o777
            text = self.key_file.read_text().strip()
        except OSError as error:
            raise HomeProblem(f"no key in {self.path}: {error.strerror}", next_step="run `ichiba init`") from None
        if mode & 0o077:
            raise HomeProblem(
                f"{self.key_file} can be read by others (mode {mode:o})", next_step=f"chmod 600 {self.key_file}"
            )
        try:
            seed = bytes.fromhex(text)
        except ValueError:
            seed = b""
        if len(seed) != 32:
            raise HomeProblem(f"{self.key_file} is damaged", next_step="restore it from your backup of the key")
        return seed

    def network(self, path: Path | None = None) -> Network:
        """The network file. Raises HomeProblem, BadNetworkFile."""
        file = path or self.network_file
        try:
            return load(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise HomeProblem(f"{file} cannot be read: {error}", next_step="run `ichiba init`") from None


SOLO = 'name = "solo"\n'
