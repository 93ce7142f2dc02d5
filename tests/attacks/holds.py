"""Bombs that go off and stay: each says one sentence when it has taken all it gets, and goes on until it is killed.

Run inside by tests/attacks/inside.py, beside honest jobs in other cages.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

from .calls import MIB, Decoys, libc


def _pause() -> None:
    while True:
        signal.pause()


def processes(_: Decoys) -> Iterator[str]:
    """As many processes as there may be, for ever: whenever one dies, another takes its place."""
    count = 0
    try:
        while True:
            if os.fork() == 0:
                _pause()
            count += 1
    except OSError:
        yield f"{count} processes"
    while True:
        os.wait()
        os.fork()


def memory(decoys: Decoys) -> Iterator[str]:
    """Children that fill memory until the kernel kills one, for ever."""
    told = False
    while True:
        while len(_children) < 4:
            child = os.fork()
            if child == 0:
                block = bytearray(int(decoys["memory"]) // 2)
                for place in range(0, len(block), 4096):
                    block[place] = 1
                _pause()
            _children.add(child)
        ended, status = os.wait()
        _children.discard(ended)
        if not told:
            yield f"a child ended with {os.waitstatus_to_exitcode(status)}"
        told = True


_children: set[int] = set()


def disk(_: Decoys) -> Iterator[str]:
    """The whole scratch folder."""
    written = 0
    try:
        for number in range(64):
            with open(f"/scratch/{number}", "xb", buffering=0) as file:
                for _part in range(4):
                    written += file.write(bytes(MIB))
    except OSError:
        yield f"{written // MIB} MiB"
    _pause()


def processor(_: Decoys) -> Iterator[str]:
    """All the time it gets, deaf to what can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    yield "goes on"
    while True:
        pass


def family(decoys: Decoys) -> Iterator[str]:
    """Three generations under one name, each in a session of its own, holding nothing that is shared."""
    libc.prctl(15, str(decoys["mark"]).encode(), 0, 0, 0)  # children inherit the name
    heard, say = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
                os.write(say, b"x")
            os.closerange(0, 256)
            _pause()
        os.closerange(0, 256)
        _pause()
    os.read(heard, 1)
    yield "a child, a grandchild and its child"
    _pause()


HOLDS: dict[str, Callable[[Decoys], Iterator[str]]] = {
    "processes": processes, "memory": memory, "disk": disk, "processor": processor, "family": family,
}  # fmt: skip
