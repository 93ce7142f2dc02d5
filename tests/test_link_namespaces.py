"""Namespaces joined by a relay: TCP goes through as slowly as it must, queues overflow, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import peer.lan
import peer.link_namespaces
from peer.demo_parallel import SLOW, slowed, words_of
from peer.lan import Lan, members
from peer.link_namespaces import LinkNamespaces, NoNamespaces

SECONDS_MAX = 60.0
DELAY_NS = 20_000_000
NAMES = Path("/var/run/netns")


def why_not() -> str:
    """Why there can be no network namespaces here; empty if there can. Asks the kernel, not the code under test."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        return "this system makes no network namespace"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"there is no TUN device: {error}"
    return ""


WHY_NOT = why_not()
real = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are namespaces")


@contextmanager
def opened(tmp_path: Path, *names: str, bits_per_second: int = 20_000_000) -> Iterator[LinkNamespaces]:
    links = LinkNamespaces.open(
        names or ("a", "b"), bits_per_second=bits_per_second, delay_ns=DELAY_NS, log=tmp_path / "relay.log"
    )
    try:
        yield links
    finally:
        links.close()
    assert (tmp_path / "relay.log").read_text() == ""


def pair(links: LinkNamespaces) -> tuple[socket.socket, socket.socket]:
    """A TCP connection from a to b."""
    with links.entered("b"):
        listener = socket.create_server((links.host_of("b"), 0))
    with listener:
        listener.settimeout(SECONDS_MAX)
        with links.entered("a"):
            near = socket.socket()
        near.settimeout(SECONDS_MAX)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(SECONDS_MAX)
    return near, far


def of_namespace(number: int) -> list[int]:
    """The processes in a network namespace, by the number of its inode."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and (entry / "ns" / "net").stat().st_ino == number:
                found.append(int(entry.name))
    return found


def named() -> set[str]:
    return {entry.name for entry in NAMES.iterdir()} if NAMES.exists() else set()


@real
def test_tcp_goes_through_whole_and_no_faster_than_the_delay(tmp_path: Path) -> None:
    before = named()
    with opened(tmp_path) as links:
        near, far = pair(links)
        with near, far:
            for _ in range(3):
                began = time.monotonic_ns()
                near.sendall(b"?")
                assert far.recv(1) == b"?"
                assert time.monotonic_ns() - began >= DELAY_NS
                far.sendall(b"!")
                assert near.recv(1) == b"!"
                assert time.monotonic_ns() - began >= 2 * DELAY_NS
            sent = os.urandom(1 << 19)
            writer = threading.Thread(target=near.sendall, args=(sent,))
            writer.start()
            got = hashlib.sha256()
            left = len(sent)
            while left:
                data = far.recv(left)
                assert data
                got.update(data)
                left -= len(data)
            writer.join(SECONDS_MAX)
        assert got.digest() == hashlib.sha256(sent).digest()
        counted = links.counters()
        assert counted["up"][0]["bytes"] > len(sent) < counted["down"][1]["bytes"], "with their headers"
        assert counted["processor_ns"] > 0 and counted["refused"] == counted["overflowed"] == 0
        assert named() == before, "they have no names"


@real
def test_a_queue_that_is_full_loses_datagrams(tmp_path: Path) -> None:
    with opened(tmp_path, bits_per_second=1_000_000) as links:
        with links.entered("a"):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            before = links.counters()
            for _ in range(300):
                sender.sendto(bytes(1400), (links.host_of("b"), 9))
            deadline = time.monotonic() + SECONDS_MAX
            while (counted := links.counters())["taken"] < before["taken"] + 300:
                assert time.monotonic() < deadline
        up, was = counted["up"][0], before["up"][0]
        assert up["dropped"] > was["dropped"]
        assert up["packets"] + up["dropped"] >= was["packets"] + was["dropped"] + 300


@real
def test_a_daemon_lives_in_the_namespace_of_its_name_and_a_sandbox_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, plain = list[str](), peer.lan.command

    def command(one: peer.lan.Running, known: tuple[str, ...]) -> list[str]:
        words = plain(one, known)
        said.append(words[words.index("--listen") + 1])
        return [sys.executable, "-c", "import time; time.sleep(600)", "up", "--data", one.data]

    monkeypatch.setattr(peer.lan, "command", command)
    lan = Lan.create(tmp_path / "lan", members(4), seed=1)
    own = os.stat("/proc/self/ns/net").st_ino
    with opened(tmp_path, *(one.member.name for one in lan.peers)) as links:
        lan.links = links
        try:
            for one in lan.peers[:2]:
                lan._spawn(one, ())
            homes = [os.stat(f"/proc/{one.pid}/ns/net").st_ino for one in lan.peers[:2]]
            assert len({own, *homes}) == 3
            assert os.stat("/proc/thread-self/ns/net").st_ino == own, "we ourselves are where we were"
            assert said == ["/ip4/10.77.0.1/tcp/0", "/ip4/10.77.0.2/tcp/0"]
        finally:
            lan.stop()
        if shutil.which("bwrap"):
            with links.entered("solver-1"):
                caged = subprocess.run(
                    ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "true"],
                    capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                )  # fmt: skip
            assert (caged.returncode, caged.stderr) == (0, "")
    assert [of_namespace(home) for home in homes] == [[], []]


STARTER = """
import os, subprocess, sys
from pathlib import Path
from peer.link_namespaces import LinkNamespaces
links = LinkNamespaces.open(["a", "b"], bits_per_second=0, delay_ns=0, log=Path(sys.argv[1]))
with links.entered("a"):
    inode = os.stat("/proc/thread-self/ns/net").st_ino
print(links._relay.pid, inode, flush=True)
sys.stdin.read()
"""


@real
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_however_the_starter_ends(tmp_path: Path, number: signal.Signals) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "relay.log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert starter.stdin is not None
    assert starter.stdout is not None
    relay, inode = map(int, starter.stdout.readline().split())
    watched = os.pidfd_open(relay)
    starter.send_signal(number)
    assert starter.wait(SECONDS_MAX) != 0
    assert select.select([watched], [], [], SECONDS_MAX)[0], "the relay lives on"
    os.close(watched)
    assert of_namespace(inode) == []
    starter.stdin.close()
    starter.stdout.close()


@real
def test_a_relay_that_dies_is_noticed(tmp_path: Path) -> None:
    with opened(tmp_path) as links:
        links.check()
        assert links._relay is not None
        links._relay.kill()
        links._relay.wait(SECONDS_MAX)
        for asked in (links.check, links.counters):
            with pytest.raises(NoNamespaces, match="has ended"):
                asked()


def refuse(name: str, *_: int) -> None:
    raise PermissionError(1, f"{name}: Operation not permitted")


def test_without_the_right_to_make_namespaces_a_shaper_serves_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer.link_namespaces, "_call", refuse)
    monkeypatch.delenv("ICHIBA_SHAPE", raising=False)
    lan, said = Lan.create(tmp_path / "lan", members(4), seed=1), list[str]()
    with slowed(lan, said.append) as links:
        assert (lan.links, os.environ["ICHIBA_SHAPE"]) == (None, SLOW)
    assert "ICHIBA_SHAPE" not in os.environ
    assert links["way"] == "shaper" and "unshare: Operation not permitted" in links["why"]
    assert "shaper" in said[0] and links["why"] in said[0]


@real
def test_with_that_right_namespaces_serve_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICHIBA_SHAPE", raising=False)
    lan, said = Lan.create(tmp_path / "lan", members(4), seed=1), list[str]()
    with slowed(lan, said.append) as links:
        assert lan.links is not None and "ICHIBA_SHAPE" not in os.environ
        assert [lan.links.host_of(one.member.name) for one in lan.peers] == [f"10.77.0.{n}" for n in (1, 2, 3, 4)]
    assert (lan.links, links["way"], links["shape"]) == (None, "namespaces", SLOW)
    assert "namespace" in said[0] and "relay" in said[0]


OUTCOME = {
    "failures": [], "stages": 2, "replicas": 1, "cheat": "", "launched_s": 3.0, "steps": 8, "first_segment_s": 9.0,
    "checked": 4, "proofs": 2, "paid_micro": 2, "spent_micro": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "told"),
    [("loopback", "this machine"), ("namespaces", "7 of 900 frames were dropped"), ("shaper", "because it is Tuesday")],
)
def test_the_closing_words_say_by_what_links_were_slow(way: str, told: str) -> None:
    counters = {"taken": 900, "dropped": 7}
    links = {"way": way, "shape": SLOW, "why": "because it is Tuesday", "counters": counters}
    assert told in words_of(OUTCOME | {"links": links})
