"""Takes the canary's place in the cage: runs attacks, twins and lies by name, after the filters are installed.

The harness copies our packages and gives worker/canary.py this module's `rehearse`, so that everything else of the
cage, boot.py and its filters included, is what an owner's machine runs. Standard library only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from worker.frames import Attempted

from .calls import Decoys, Refused
from .catalogue import ATTACKS
from .holds import HOLDS

_ATTACKS = {attack.name: attack for attack in ATTACKS}
_TWINS = {twin.__name__: twin for a in ATTACKS for twin in (a.twin, a.twin_script) if twin is not None}


def rehearse(names: tuple[str, ...], decoys: Decoys) -> Iterator[Attempted]:
    """What became of each of `names`: an attack, "twin NAME", "hold NAME" (goes on after its answer), or "speech"
    (never answers).

    blocked means that it did not do what it wanted, of a twin too. A mistake of an attack's own ends the worker.
    """
    for name in names:
        kind, _, rest = name.partition(" ")
        if name == "speech":
            _speak(decoys)
        elif kind == "hold":
            for words in HOLDS[rest](decoys):
                yield Attempted(name, False, words)
        elif kind == "twin":
            try:
                _TWINS[rest](decoys)
            except (AssertionError, OSError, ValueError, MemoryError, Refused) as failure:
                yield Attempted(name, True, f"{type(failure).__name__}: {failure}"[:200])
            else:
                yield Attempted(name, False, "")
        else:
            try:
                words = _ATTACKS[name].run(decoys)
            except (Refused, OSError, MemoryError) as stopped:
                yield Attempted(name, True, f"{type(stopped).__name__}: {stopped}"[:200])
            else:
                yield Attempted(name, not words, words[:200] or "no effect")


def _speak(decoys: Decoys) -> None:
    """Say the words of a lie on the pipe of replies, then do what comes after it."""
    words, replies = bytes.fromhex(str(decoys["words"])), int(decoys["replies"])
    os.write(2, bytes.fromhex(str(decoys["print"])))
    while words:
        words = words[os.write(replies, words) :]
    then = decoys["then"]
    if then == "flood":
        for _ in range(40 * 16):
            os.write(1, b"x" * 65536)
    if then == "loop":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if then == "close":
        os.close(replies)
    if then in ("close", "wait"):
        while True:
            signal.pause()
    os._exit(0)
