"""A swarm of daemons on one machine: its network file, its data directories, its processes, and their end.

Promises: every daemon is a process group of its own, known by process number *and* start time, so a number that the
system gave to somebody else is never killed; `stop` ends them all, waits until none of them nor of their workers is
left, and says so only then; with `guard` they do not outlive whoever started them, however it dies. Refuses to know
what the daemons do with each other. Needs Linux's /proc, as the sandbox does.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from peer.client import Client, ConnectionLost, DaemonNotRunning
from peer.home import Home
from protocol.codec import blake
from protocol.credits import credits_of
from protocol.errors import IchibaError
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules, dump
from protocol.params import MICRO_PER_CREDIT
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, ROLE_WHISTLEBLOWER

if TYPE_CHECKING:
    from peer.link_namespaces import LinkNamespaces

__all__ = ["LAN_RULES", "Lan", "LanProblem", "Member", "members"]

SCHEMA: Final = "ichiba.swarm/1"
MEMBERS_MAX: Final = 32  # daemons of about 90 MB each, and a torch worker of 300 MB for every one that works
START_SECONDS_MAX: Final = 90.0  # import, sandbox probe and listen take 2-4 s, 20 times that on a loaded machine
STOP_SECONDS_MAX: Final = 8.0  # a clean end takes about a second; then it is killed
DEATH_SECONDS_MAX: Final = 10.0  # from SIGKILL to gone
POLL_SECONDS: Final = 0.05
LOG_LINES_SHOWN: Final = 12
LOOPBACK: Final = "127.0.0.1"
SUBMITTER_FREE_MICRO: Final = 1000 * MICRO_PER_CREDIT
STAKE_MICRO: Final = 100 * MICRO_PER_CREDIT  # the demo's job locks about 7 credits

# One machine, nobody far away: what waits for a lost peer waits seconds, and every deal is audited.
LAN_RULES: Final = Rules(
    check_segments_min=2,
    audit_permille=1000,
    wrong_quorum=2,
    proposal_ms=5_000,
    segment_silence_ms=180_000,
    lost_grace_ms=4_000,
    reveal_ms=5_000,
    check_silence_ms=180_000,
    settle_silence_ms=10_000,
    claim_window_ms=5_000,
    challenge_ms=6_000,
    dispute_replay_ms=180_000,
    dispute_move_ms=90_000,  # a question takes a second or two; workers of nine daemons may share two busy cores
)


class LanProblem(IchibaError):
    """A daemon of the swarm did not start, or would not end."""

    code = "swarm"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon. roles: a bit set (protocol.records); unit_price: micro-credits per giga-operation."""

    name: str
    roles: int
    unit_price: int = 0
    free_micro: int = 0
    stake_micro: int = STAKE_MICRO
    cheat: str = ""
    notary: bool = False


class Running(msgspec.Struct, kw_only=True):
    """One daemon in swarm.json. `born`: its start time in clock ticks since boot; `peer`: its name on the network;
    `host`: where it listens."""

    member: Member
    peer: str
    data: str
    log: str
    pid: int = 0
    born: int = 0
    host: str = LOOPBACK

    def client(self) -> Client:
        """Its control socket, as its owner uses it."""
        return Client(Path(self.data))


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    schema: str
    peers: list[Running]


def members(count: int = 5, *, cheat: str = "", notaries: int = 0) -> tuple[Member, ...]:
    """A submitter, two solvers of different prices, a verifier, a whistleblower, then more of the last four kinds.

    cheat: the fraud of worker/cheats.py that the cheaper solver commits. notaries: peers beside `count` that do nothing
    but arbitrate: a party cannot judge itself, and the peers of a small market are all parties. Raises LanProblem for
    a count that is no market, or too many for one machine.
    """
    if not 4 <= count <= MEMBERS_MAX - notaries:
        raise LanProblem(
            f"a swarm of {count} peers and {notaries} notaries, 4 to {MEMBERS_MAX} are possible",
            why="a market needs a submitter, a solver, and two checkers to convict a cheat",
        )
    kinds = (
        ("solver", ROLE_SOLVER, 1200),
        ("verifier", ROLE_VERIFIER, 1200),  # what it asks for a profile; a check pays the price of the deal
        ("whistleblower", ROLE_WHISTLEBLOWER, 0),
        ("solver", ROLE_SOLVER, 1800),
    )
    found = [Member(name="submitter", roles=0, free_micro=SUBMITTER_FREE_MICRO)]
    seen: dict[str, int] = {}
    for index in range(count - 1):
        kind, roles, price = kinds[index % len(kinds)]
        seen[kind] = seen.get(kind, 0) + 1
        name = f"{kind}-{seen[kind]}" if kind == "solver" or seen[kind] > 1 else kind
        found.append(Member(name=name, roles=roles, unit_price=price, cheat=cheat if index == 0 else ""))
    found += [Member(name=f"notary-{n}", roles=0, stake_micro=0, notary=True) for n in range(1, notaries + 1)]
    return tuple(found)


@dataclass
class Lan:
    """The swarm under `path`. Make it with `create`, find it again with `load`. links: in whose namespaces its daemons
    are started; else all on loopback."""

    path: Path
    peers: list[Running] = field(default_factory=list)
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    links: LinkNamespaces | None = None

    @classmethod
    def create(cls, path: Path, wanted: Sequence[Member], *, seed: int | None = None, rules: Rules = LAN_RULES) -> Lan:
        """Make keys, the network file and the data directories; nothing runs yet.

        seed: draws the keys, for a swarm that is the same every time; None draws them from the system. Raises
        LanProblem if a swarm is there already, HomeProblem if a directory cannot be made.
        """
        path = path.absolute()
        if (path / "swarm.json").exists():
            raise LanProblem(
                f"there is a swarm in {path} already",
                next_step=f"choose another --dir, or `ichiba swarm down --dir {path}` and remove it",
            )
        lan = cls(path)
        seeds = {m.name: _seed(seed, m.name) for m in wanted}
        names = {name: peer_name(SigningKey.from_seed(one).public) for name, one in seeds.items()}
        deposits = tuple(
            Deposit(peer=names[m.name], free_micro=m.free_micro, stake_micro=m.stake_micro) for m in wanted
        )
        notaries = tuple(names[m.name] for m in wanted if m.notary)
        text = dump(Network(name="lan", rules=rules, deposits=deposits, notaries=notaries))
        for member in wanted:
            home = Home(path / member.name)
            home.create(text, seed=seeds[member.name])
            log = home.path / "daemon.log"
            lan.peers.append(Running(member=member, peer=names[member.name], data=str(home.path), log=str(log)))
        path.chmod(0o700)
        lan.network_file.write_text(text)
        lan.save()
        return lan

    @classmethod
    def load(cls, path: Path) -> Lan:
        """The swarm whose swarm.json is in `path`. Raises LanProblem if there is none, or it cannot be read."""
        file = path.absolute() / "swarm.json"
        try:
            given = msgspec.json.decode(file.read_bytes(), type=_File)
        except FileNotFoundError:
            raise LanProblem(f"no swarm in {path}", next_step=f"ichiba swarm up --dir {path}") from None
        except (OSError, msgspec.DecodeError) as error:
            raise LanProblem(f"{file} cannot be read: {error}") from None
        if given.schema != SCHEMA:
            raise LanProblem(f"{file} is of another version: {given.schema!r}")
        return cls(path.absolute(), given.peers)

    @property
    def network_file(self) -> Path:
        """The network all of them are on."""
        return self.path / "network.toml"

    def save(self) -> None:
        """Write swarm.json, whole or not at all."""
        part = self.path / "swarm.json.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(_File(schema=SCHEMA, peers=self.peers)), indent=1))
        part.replace(self.path / "swarm.json")

    def of(self, name: str) -> Running:
        """One peer by its name in the swarm, such as `solver-1`."""
        return next(one for one in self.peers if one.member.name == name)

    def name_of(self, peer: str) -> str:
        """The name in the swarm of a peer of the network; of a stranger, its own."""
        return next((one.member.name for one in self.peers if one.peer == peer), peer)

    # --- starting ------------------------------------------------------------------------------------------
    def start(self, told: Callable[[str], None] = lambda _: None) -> None:
        """Start all daemons and return when each answers on its control socket; `told` hears of each by name.

        The first starts alone, and the others are told its address in case the network has no multicast; whom else
        there is they learn from it. Raises LanProblem with the last log lines of a daemon that ended or stays
        silent; those that run are left to `stop`.
        """
        first, *others = self.peers
        self._spawn(first, ())
        addresses = self._await(first)["addresses"]
        told(first.member.name)
        for one in others:
            self._spawn(one, addresses[:1])
        for one in others:
            self._await(one)
            told(one.member.name)

    def _spawn(self, one: Running, known: Sequence[str]) -> None:
        name = one.member.name
        one.host = self.links.host_of(name) if self.links else LOOPBACK
        with Path(one.log).open("ab") as log, self.links.entered(name) if self.links else nullcontext():
            child = subprocess.Popen(
                command(one, known),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=one.data,
                start_new_session=True,
            )
        self.children[name] = child
        one.pid, one.born = child.pid, born(child.pid) or 0
        self.save()

    def _await(self, one: Running) -> dict[str, Any]:
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            self.check(one)
            try:
                with one.client() as client:
                    return client.status()
            except (DaemonNotRunning, ConnectionLost):
                time.sleep(POLL_SECONDS)
        raise self._failed(one, f"{one.member.name} does not answer after {START_SECONDS_MAX:.0f} s")

    def check(self, one: Running) -> None:
        """Raise LanProblem, with its last log lines, if a daemon that was started is not running."""
        self.reap()
        if not alive(one.pid, one.born):
            child = self.children.get(one.member.name)
            code = f" with status {child.returncode}" if child is not None else ""
            raise self._failed(one, f"{one.member.name} ended{code}")

    def meet(self, *, seconds: float, told: Callable[[list[int]], None] = lambda _: None) -> None:
        """Return when every daemon is connected to all others and has heard their asks.

        told: hears how many peers each sees, whenever that changes. Raises LanProblem, saying who sees whom, when
        it takes longer than `seconds`, or why a peer does not take the work it is there for.
        """
        wanted = len(self.peers) - 1
        asking = sum(bool(one.member.roles) for one in self.peers)
        deadline, before = time.monotonic() + seconds, list[int]()
        while True:
            seen = [self._status(one) for one in self.peers]
            counts = [len(status["peers"]) for status in seen]
            if counts != before:
                before = counts
                told(counts)
            if min(counts) >= wanted and all(status["asks_seen"] >= asking for status in seen):
                return
            if time.monotonic() >= deadline:
                who = ", ".join(f"{one.member.name} {count}" for one, count in zip(self.peers, counts, strict=True))
                raise LanProblem(
                    f"the peers do not all see each other after {seconds:.0f} s",
                    why=f"of {wanted} others they see: {who}",
                    next_step=f"see the daemon.log files under {self.path}",
                )
            time.sleep(4 * POLL_SECONDS)

    def _status(self, one: Running) -> dict[str, Any]:
        try:
            with one.client() as client:
                status = client.status()
                if status["roles"] != one.member.roles:
                    bad = [line["explanation"] for line in client.doctor() if line["level"] == "bad"]
                    raise LanProblem(
                        f"{one.member.name} takes no work", why="; ".join(bad), next_step="run `ichiba doctor`"
                    )
                return status
        except (DaemonNotRunning, ConnectionLost):
            self.check(one)
            raise

    def _failed(self, one: Running, what: str) -> LanProblem:
        return LanProblem(what, why=f"its log ends with:\n{self.tail(one)}", next_step=f"see {one.log}")

    @staticmethod
    def tail(one: Running) -> str:
        """The last lines a daemon wrote."""
        try:
            lines = Path(one.log).read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(f"    {line}" for line in lines[-LOG_LINES_SHOWN:]) or "    (empty)"

    # --- watching and ending -------------------------------------------------------------------------------
    def reap(self) -> None:
        """Take notice of own children that ended."""
        for child in self.children.values():
            child.poll()

    def running(self) -> list[Running]:
        """The daemons that are alive."""
        self.reap()
        return [one for one in self.peers if alive(one.pid, one.born)]

    def kill(self, name: str) -> None:
        """SIGKILL to one daemon's process group, as a machine that loses power. Returns when it is gone.

        Raises LanProblem if it, or a worker of it, is still there after DEATH_SECONDS_MAX.
        """
        one = self.of(name)
        self._end([one], descendants([one.pid]), gently=False)

    def stop(self) -> int:
        """End every daemon and all that came of it; the number that ran. Does nothing the second time.

        Raises LanProblem, with their numbers, if processes remain.
        """
        found = self.running()
        strays = {(pid, time_) for pid, time_ in self._strays() if pid not in {one.pid for one in found}}
        self._end(found, strays | descendants([one.pid for one in found]), gently=True)
        left = self._strays()
        if left:
            raise LanProblem(f"processes {sorted(pid for pid, _ in left)} of this swarm are still there")
        for one in self.peers:
            one.pid = one.born = 0
        self.save()
        return len(found)

    def _end(self, daemons: Iterable[Running], others: set[tuple[int, int]], *, gently: bool) -> None:
        """A clean end for the daemons if `gently`, then SIGKILL for whatever is left of them and of `others`."""
        every = {(one.pid, one.born) for one in daemons if one.pid}
        if gently:
            for pid, _ in every:
                _signal(pid, signal.SIGTERM, group=False)
            self._wait(every, STOP_SECONDS_MAX)
        for pid, time_ in every:
            if alive(pid, time_):
                _signal(pid, signal.SIGKILL, group=True)
        # A daemon's death takes its workers along; what is still there after a moment is killed by itself.
        self._wait(every | others, 1.0)
        for pid, time_ in others:
            if alive(pid, time_):
                _signal(pid, signal.SIGKILL, group=False)
        left = self._wait(every | others, DEATH_SECONDS_MAX)
        if left:
            raise LanProblem(f"processes {sorted(pid for pid, _ in left)} would not end")

    def _wait(self, them: set[tuple[int, int]], seconds: float) -> set[tuple[int, int]]:
        """Those still alive when none is, or when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            self.reap()
            left = {(pid, time_) for pid, time_ in them if alive(pid, time_)}
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(POLL_SECONDS)

    def _strays(self) -> set[tuple[int, int]]:
        """Processes whose command line names a data directory of this swarm, whether swarm.json knows them or not."""
        homes = {os.fsencode(one.data) for one in self.peers}
        found = set()
        for pid in _pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            time_ = born(pid)
            if time_ is not None and b"up" in words and homes & set(words):
                found.add((pid, time_))
        return found

    # --- not outliving -------------------------------------------------------------------------------------
    def guard(self, *, remove: bool) -> Callable[[], None]:
        """Start a process that ends this swarm as soon as this one is gone, by whatever death.

        remove: it then removes the directory too. Returns a function that lets the guard go. The guard notices by
        the end of a pipe that only this process holds.
        """
        read, write = os.pipe()
        guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "peer.lan", str(self.path), "remove" if remove else "keep"],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)

        def release() -> None:
            with suppress(BrokenPipeError):
                os.write(write, b"done")
            os.close(write)
            guard.wait()

        return release


def command(one: Running, known: Sequence[str]) -> list[str]:
    """The command line of a daemon that is told the addresses `known`."""
    member = one.member
    bits = {"solver": ROLE_SOLVER, "verifier": ROLE_VERIFIER, "whistleblower": ROLE_WHISTLEBLOWER}
    roles = [name for name, bit in bits.items() if member.roles & bit]
    words = [sys.executable, "-P", "-m", "peer.cli", "up", "--data", one.data, "--listen", f"/ip4/{one.host}/tcp/0"]
    words += ["--roles", ",".join(roles) or "none", "--price", credits_of(member.unit_price)]
    for address in known:
        words += ["--peer", address]
    return words + (["--cheat", member.cheat] if member.cheat else [])


def _seed(seed: int | None, name: str) -> bytes:
    if seed is None:
        return secrets.token_bytes(32)
    return blake("ichiba/lan-key", seed.to_bytes(8, "big"), name.encode())


# --- processes, by /proc/PID/stat of proc(5) ------------------------------------------------------------------
def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone. A zombie is gone."""
    fields = _stat(pid) if pid > 0 else []
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def alive(pid: int, time_: int) -> bool:
    """Whether this very process is there."""
    return bool(time_) and born(pid) == time_


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def descendants(roots: Iterable[int]) -> set[tuple[int, int]]:
    """(number, start time) of every process that descends from `roots`, themselves not included."""
    children: dict[int, list[tuple[int, int]]] = {}
    for pid in _pids():
        fields, time_ = _stat(pid), born(pid)
        if fields and time_ is not None:
            children.setdefault(int(fields[1]), []).append((pid, time_))
    found: set[tuple[int, int]] = set()
    todo = list(roots)
    while todo:
        for child in children.get(todo.pop(), []):
            if child not in found:
                found.add(child)
                todo.append(child[0])
    return found


def _signal(pid: int, number: signal.Signals, *, group: bool) -> None:
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)


def _guard_main(path: Path, afterwards: str) -> None:
    """The guard: wait for the end of standard input; unless a word came first, end the swarm."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.buffer.read():
        return
    Lan.load(path).stop()
    if afterwards == "remove":
        shutil.rmtree(path)


if __name__ == "__main__":
    _guard_main(Path(sys.argv[1]), sys.argv[2])
