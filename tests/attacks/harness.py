"""Runs every attack in the real cage, from outside it, and prints what became of each as one JSON line.

    python -m tests.attacks.harness [--level 3]

A program of its own, because it runs as root and as an ordinary user (tests/attacks/as_user.py). Stands for the
daemon: it holds secrets in memory and in files, listens, has a terminal, and runs another worker beside.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import pty
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import trio

import peer.workshop
import protocol
from peer.workshop import SegmentDone, WorkFailed, WorkOrder, Workshop
from protocol import params, safetensors
from protocol.errors import MalformedRecord
from tests.attacks.catalogue import ATTACKS, SPEECHES, Attack, Speech
from tests.attacks.speeches import CHECKPOINT_BYTES_MAX, ESCAPE, STEPS, WORDS
from tests.attacks.twins import LENT
from worker import cage, sandbox
from worker.cage import Cage, Level
from worker.frames import Attempted, Done, Failed, Frames, Ready, Rehearsal
from worker.sandbox import SandboxReport
from worker.seccomp import Tier

MEMORY_BYTES = 192 * 1024 * 1024
SPEECH_SECONDS = 1.5  # the deadline of a liar's job, from its first word; only those that never end need it
Verdict = dict[str, str]
"""verdict: "blocked" or "open", detail, twin: "" if it worked, else why not."""

START = Cage.start


@contextlib.contextmanager
def hostile_code() -> Iterator[Path]:
    """A copy of our packages in which the canary rehearses tests/attacks; cages run that copy meanwhile."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="ichiba-attacks-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(cage.__file__).parent, folder / "worker", ignore=ignore)
        shutil.copytree(Path(str(protocol.__file__)).parent, folder / "protocol", ignore=ignore)
        shutil.copytree(here, folder / "worker" / "attacks", ignore=ignore)
        with (folder / "worker" / "canary.py").open("a") as canary:
            canary.write("\nfrom worker.attacks.inside import rehearse as rehearse\n")
        with mock.patch.object(cage, "_HERE", folder / "worker"):
            yield folder


@contextlib.contextmanager
def prey(folder: Path) -> Iterator[dict[str, str | int]]:
    """What the attacks want to reach, beside what the canary's decoys are."""
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    for path in (folder, home, home / ".ssh"):
        path.chmod(0o755)
    (folder / "lent").write_bytes(LENT)
    lent = (folder / "lent").stat()
    secret, scribble = ctypes.create_string_buffer(b"a key in memory"), ctypes.create_string_buffer(64)
    inheritable = os.open(folder / "lent", os.O_RDWR)
    os.set_inheritable(inheritable, True)
    try:
        with sandbox._Decoys() as decoys:
            yield decoys | {
                "home": str(home), "address": ctypes.addressof(secret), "scribble": ctypes.addressof(scribble),
                "lent": str(folder / "lent"), "lent_device": lent.st_dev, "lent_inode": lent.st_ino,
                "memory": MEMORY_BYTES, "mark": f"left{os.getpid()}",
            }  # fmt: skip
        assert scribble.raw == bytes(64), "somebody wrote into the daemon's memory"
    finally:
        os.close(inheritable)


def take_terminal() -> None:
    """Give this process a controlling terminal, which a worker would inherit unless something takes it away."""
    os.setsid()
    _, slave = pty.openpty()
    fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY


@contextlib.asynccontextmanager
async def victim(level: Level) -> AsyncIterator[int]:
    """Another worker beside; its number outside."""
    other = await START(level, torch=False)
    try:
        await other.receive()
        yield other.process.pid
    finally:
        await other.kill()


async def converse(attacker: Cage, names: tuple[str, ...], decoys: dict[str, str | int]) -> dict[str, Attempted]:
    """What the worker in `attacker` says of `names`; it may die before the last."""
    told: dict[str, Attempted] = {}
    lent = os.open(str(decoys["lent"]), os.O_RDONLY)
    frames = Frames()
    try:
        with trio.fail_after(params.SANDBOX_PROBE_SECONDS_MAX):
            while data := await attacker.receive():
                for reply in frames.feed(data):
                    if isinstance(reply, Ready):
                        await attacker.send(Rehearsal(attempts=names, decoys=decoys), [lent])
                    elif isinstance(reply, Attempted):
                        told[reply.attempt] = reply
                    elif isinstance(reply, Done | Failed):
                        return told
    finally:
        os.close(lent)
    return told


def twins_of(attack: Attack, tier: Tier) -> list[str]:
    found = [attack.twin] + ([attack.twin_script] if attack.twin_script and tier is Tier.BASE else [])
    return [f"twin {twin.__name__}" for twin in found]


def judge(attack: Attack, tier: Tier, told: dict[str, Attempted], death: str, log: str) -> Verdict:
    """`death`: "" if the worker ended by itself, else how it died, which counts for an attack that had not answered."""
    twin = "; ".join(
        f"{name}: {told[name].detail if name in told else log[-200:]}"
        for name in twins_of(attack, tier)
        if name not in told or told[name].blocked
    )
    said = told.get(attack.name)
    if said is not None:
        return {"verdict": "blocked" if said.blocked else "open", "detail": said.detail, "twin": twin}
    deaths = {f"signal {number}" for number in attack.alone or ()}
    return {"verdict": "blocked" if death in deaths else "open", "detail": death or log[-200:], "twin": twin}


def death_of(status: int | None, attacker: Cage) -> str:
    if status is None or 0 <= status <= 128:
        return "signal 9" if attacker.oom_kills else ""
    return f"signal {-status if status < 0 else status - 128}"


async def run_attacks(level: Level, tier: Tier, decoys: dict[str, str | int]) -> dict[str, Verdict]:
    """All attacks by code inside: most in one cage, those that may end their worker in one each."""
    attacks = [a for a in ATTACKS if a.free or level > Level.NONE]  # nothing would stop the others from doing harm
    batches = [[a for a in attacks if a.alone is None], *([a] for a in attacks if a.alone is not None)]
    found: dict[str, Verdict] = {}
    for batch in batches:
        # Each twin runs before its attack; with many in one cage they show that the cage is whole after each attack.
        names = tuple(name for attack in batch for name in (*twins_of(attack, tier), attack.name))
        attacker = await START(level, tier=tier, torch=False, memory_bytes=MEMORY_BYTES)
        try:
            told = await converse(attacker, names, decoys)
            with trio.move_on_after(1):
                await trio.lowlevel.wait_readable(attacker.pidfd)  # so that its own end is seen, not our kill
        finally:
            status = await attacker.kill()
        for attack in batch:
            found[attack.name] = judge(attack, tier, told, death_of(status, attacker), attacker.log.tail())
            if attack.name.startswith("a grandchild") and found[attack.name]["detail"] == "it was started":
                found[attack.name]["verdict"] = "open" if alive(str(decoys["mark"])) else "blocked"
    return found


def alive(mark: str) -> bool:
    """Whether a process of that name runs."""
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    return mark in names


def liars_order(folder: Path) -> WorkOrder:
    """A job of one segment; its program is never read, because its worker lies instead."""
    from tests.attacks.liars_task import task_bytes

    (folder / "program").write_bytes(b"unread")
    return WorkOrder(
        work_id="liar", task=task_bytes(STEPS), program=folder / "program", arrays={}, base=None, first_segment=0,
        last_segment=1, threads=1, memory_bytes=params.SANDBOX_MEMORY_BYTES_MIN, wall_seconds=SPEECH_SECONDS,
        checkpoint_bytes_max=CHECKPOINT_BYTES_MAX,
    )  # fmt: skip


async def hear(workshop: Workshop, order: WorkOrder, words: str) -> tuple[str, str, bool]:
    """Run one liar's job as the daemon does. (the code it ended with, all that a person would see, step 0 was heard)"""
    heard: list[int] = []
    seen: list[bytes] = []
    said, then = WORDS[words]
    spoken: dict[str, str | int] = {"words": said.hex(), "then": then, "print": ESCAPE.encode().hex()}
    request = Rehearsal(attempts=("speech",), decoys=spoken)

    async def keep(done: SegmentDone) -> None:
        seen.append(done.checkpoint.read_bytes())
        done.checkpoint.unlink()

    code, shown = "", ""
    with mock.patch.object(peer.workshop, "_request", lambda *_: request):
        try:
            done = await workshop.run(order, on_step=lambda step, loss: heard.append(step), on_segment=keep)
            shown = done.log_tail
            safetensors.parse(seen[0])
        except WorkFailed as failure:
            code, shown = failure.code, f"{failure} {failure.log_tail}"
        except MalformedRecord as failure:
            code = f"{failure.code}: {failure.what}"
    return code, shown, 0 in heard


async def run_speeches(level: Level, tier: Tier, folder: Path) -> dict[str, Verdict]:
    """All lies to the daemon, through the workshop that the daemon runs jobs with."""

    async def proven() -> SandboxReport:
        return SandboxReport(level, {level: ()}, 0.0)

    found: dict[str, Verdict] = {}
    start = partial(START, tier=tier, torch=False)
    with mock.patch.object(peer.workshop, "probe", proven), mock.patch.object(peer.workshop.Cage, "start", start):
        async with Workshop(folder / "workshop", minimum=level) as workshop:
            order = liars_order(folder)
            code, _, _ = await hear(workshop, order, "honest")
            honest = "" if not code else f"an honest worker failed too: {code}"
            for speech in SPEECHES:
                found[speech.name] = await _lie(workshop, order, speech, honest)
            assert not list((folder / "workshop").iterdir()), "a liar left a file behind"
    return found


async def _lie(workshop: Workshop, order: WorkOrder, speech: Speech, honest: str) -> Verdict:
    code, shown, heard = await hear(workshop, order, speech.words)
    clean = all(c.isprintable() or c in "\n\t" for c in shown)
    stopped = code.startswith(speech.expected) and clean and len(shown) < params.SANDBOX_LOG_KEPT_BYTES + 4096
    detail = code if clean else f"{code}, shown {shown[:100]!r}"
    return {
        "verdict": "blocked" if stopped else "open",
        "detail": detail,
        "twin": honest or ("" if heard else "its true first step was not heard"),
    }


async def run(level: Level) -> dict[str, dict[str, Verdict]]:
    """Every attack at `level`, in both tiers where both exist."""
    # No script runs at FILTERED, and without a filter there are no tiers.
    tiers = {Level.NONE: (Tier.BASE,), Level.FILTERED: (Tier.GRAPH,)}.get(level, tuple(Tier))
    results: dict[str, dict[str, Verdict]] = {}
    with hostile_code() as folder:
        folder = folder / "prey"
        folder.mkdir()
        with prey(folder) as decoys:
            async with victim(level) as number:
                for tier in tiers:
                    results[tier.value] = await run_attacks(level, tier, decoys | {"victim": number})
                    if level > Level.NONE:
                        results[tier.value] |= await run_speeches(level, tier, folder)
    return results


def main() -> None:
    """Prove the level as the daemon would, then attack it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--level", type=int, help="attack this level instead of the one the canary proves")
    wanted = parser.parse_args().level
    with contextlib.suppress(OSError):  # already a session's leader: then it has what terminal it has
        take_terminal()
    report = trio.run(sandbox.probe)
    level = report.level if wanted is None else Level(wanted)
    claimed = level is Level.NONE or Level.FILTERED <= level <= report.level
    results = trio.run(run, level) if claimed else {}
    print(json.dumps({"uid": os.getuid(), "level": level, "words": report.words(), "results": results}))


if __name__ == "__main__":
    main()
