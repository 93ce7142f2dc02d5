"""A real node over a real store in a process that dies on command, at any effect it performs.

Run as `crash_node_child.py` it is a nursery, as tests/crash_child.py is: each birth is a forked process that opens the
store, builds the node from it, and then takes inputs of the node from standard input, commits what they change, and
performs every other effect by appending it to a file, which is the world. A life dies at the first *point* that no life
before it died at: before, in the middle of (half of it is in the file) or after an effect of a kind, or around a commit
that an effect follows. Frames are pickles behind their length, from and to our own test only.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.desk import Means
from peer.events import Command, Effect, Emit, Input, Post, Publish, Save, Send
from peer.messages import unpack
from peer.node import Node
from peer.store import Batch, Store
from protocol.codec import decode
from protocol.keys import SigningKey
from protocol.network import Network
from protocol.records import open_record


@dataclass(frozen=True)
class Birth:
    """What a life needs to know. covered: the points it need not die at."""

    directory: Path
    world: Path
    died_at: Path
    seed: bytes
    network: Network
    means: Means
    rng: int
    now_ns: int
    covered: frozenset[str]


def read_frame(descriptor: int) -> Any:
    """The next frame; None at the end of the stream or for a torn one."""
    head = _exactly(descriptor, 4)
    body = _exactly(descriptor, int.from_bytes(head, "big")) if len(head) == 4 else b""
    return pickle.loads(body) if body else None  # noqa: S301  # our own test's


def _exactly(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(descriptor, size - len(data))
        if not more:
            return b""
        data += more
    return data


def frame(value: Any) -> bytes:
    """A value as a frame."""
    body = pickle.dumps(value)
    return len(body).to_bytes(4, "big") + body


def kind_of(effect: Effect, network: bytes) -> str:
    """The name of an effect for the list of points: of a message or a record, with what it is."""
    if isinstance(effect, Send):
        return f"send {type(unpack(effect.data)).__name__}"
    if isinstance(effect, Publish):
        bundle = decode(list[bytes], effect.data, bytes_max=2**20)
        return "publish " + "+".join(sorted({type(open_record(e, network=network)[0]).__name__ for e in bundle}))
    return type(effect).__name__


class Life:
    """One process between its birth and its death."""

    def __init__(self, birth: Birth) -> None:
        self.birth = birth
        key = SigningKey.from_seed(birth.seed)
        self.store = Store.open(birth.directory, birth.network.id, key.public)
        self.world = os.open(birth.world, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.node = Node(
            key=key, network=birth.network, rng=random.Random(birth.rng), means=birth.means, ledger=self.store.ledger(),
            rows=lambda table, prefix=b"": list(self.store.rows(table, prefix)), now_ns=birth.now_ns,
        )  # fmt: skip

    def point(self, name: str, half: bytes = b"") -> None:
        """Die here if nobody has; `half` of an effect reaches the world first."""
        if name not in self.birth.covered:
            if half:
                os.write(self.world, half)
            self.birth.died_at.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def take(self, event: Input, now_ns: int) -> None:
        """The daemon's loop for one input (peer/daemon.py): handle, commit, perform."""
        effects = self.node.handle(event, now_ns)
        outside = [e for e in effects if not isinstance(e, Save | Post | Emit)]
        puts = tuple((e.table, e.key, e.value) for e in effects if isinstance(e, Save))
        entries = tuple(e.entry for e in effects if isinstance(e, Post))
        mortal = not isinstance(event, Command)  # a person at the terminal sees what became of a command
        leaving = "+".join(sorted({kind_of(e, self.birth.network.id) for e in outside})) if mortal else ""
        if puts or entries:
            if leaving:
                self.point(f"before the commit of {leaving}")
            self.store.commit([Batch(puts, entries)])
        for effect in outside:
            whole, name = frame(effect), kind_of(effect, self.birth.network.id)
            if mortal:
                self.point(f"before {name}")
                self.point(f"torn {name}", whole[: len(whole) // 2])
            os.write(self.world, whole)
            if mortal:
                self.point(f"after {name}")


def be_born(birth: Birth) -> int:
    """Live in a new process until standard input says to end; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        life = Life(birth)
        os.write(1, frame("born"))
        while (order := read_frame(0)) is not None:
            life.take(*order)
            os.write(1, frame("done"))
        life.store.close()
        os._exit(0)
    finally:
        # Reached by an exception only: a life must never return into the nursery's loop.
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Serve lives until standard input ends."""
    while (birth := read_frame(0)) is not None:
        _, status = os.waitpid(be_born(birth), 0)
        os.write(1, frame(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
    sys.exit(0)
