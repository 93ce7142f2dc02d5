"""The demonstration of a parallel job: a small GPT, cut into units that as many solvers train together.

What it says at the end was asked of the daemons: who was placed where, how long a step took, what was re-executed, who
was paid, and that the money adds up. Starts real daemons (peer/lan.py) and speaks to them as people do.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from peer.client import Client
from peer.demo import DemoFailed, ichiba
from peer.lan import LAN_RULES, SUBMITTER_FREE_MICRO, Lan, Member
from peer.link_namespaces import LinkNamespaces, NoNamespaces
from peer.link_shaper import parse_shaper
from protocol.credits import credits_of
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER

__all__ = ["CHEAT", "SLOW", "caught_words", "run_parallel_demo", "words_of"]

SLOW: Final = "50ms,100mbit"  # peer/cli_swarm.py says so too
CHEAT: Final = "solver-1"  # the cheapest, so it has a unit
SECONDS_MAX: Final = 1500.0
LOOK_SECONDS: Final = 1.0
MODEL: Final = '''\
"""A small character GPT. The model is in worker/char_gpt.py."""

import numpy as np
import torch

from worker.capture import Training
from worker.char_gpt import CharGPT, corpus, loss


def build():
    """Model, loss, optimizer, and one micro-batch."""
    model = CharGPT(context=32, width=64, heads=4, layers=LAYERS, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    example = torch.zeros(2, 32, dtype=torch.int64)
    return Training(model, loss, optimizer, {"x": example, "y": example.clone()})


def data():
    """The text as one array of ASCII codes."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
'''
JOB: Final = """\
name = "gpt-parallel"
model = "model.py:build"
data = "model.py:data"
initial = "seed"
mode = "exact"
width = 15
seed = 3
steps = {steps}
steps_per_segment = {per_segment}
budget = "60.00"
price = 20000

[batch]
rule = "windows"
size = 2
length = 32

[learning_rate]
kind = "warmup-cosine"
peak = 0.001
floor = 0.0001
warmup_steps = 2

[parallel]
stages = {stages}
replicas = {replicas}
micro_batches = 4
"""


def run_parallel_demo(
    *, stages: int, replicas: int, steps: int, slow: bool, cheat: str, path: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Start a submitter and a solver for each unit, train, and stop them. Returns the figures, `failures` among them:
    what was not as it should be. slow: links of SLOW (`slowed` says by what). cheat: of worker.cheats.UNIT_CHEATS,
    which CHEAT commits; there is one more solver then, who is dearer. Raises IchibaError.

    However this process ends, the swarm and its links end too, and a directory of their own making is removed."""
    place = path or Path(tempfile.mkdtemp(prefix="ichiba-parallel-"))
    both = ROLE_SOLVER | ROLE_VERIFIER  # each also checks the units of others, when its own is done
    wanted = [Member(name="submitter", roles=0, free_micro=SUBMITTER_FREE_MICRO)]
    solvers = range(1, stages * replicas + 1)
    wanted += [Member(name=f"solver-{n}", roles=both, unit_price=1200 + 10 * n) for n in solvers]
    if cheat:
        wanted[1] = msgspec.structs.replace(wanted[1], cheat=cheat)
        wanted.append(Member(name=f"solver-{len(wanted)}", roles=both, unit_price=1800))
    lan = Lan.create(place, wanted, rules=msgspec.structs.replace(LAN_RULES, proposal_ms=15_000))
    release = lan.guard(remove=path is None)
    try:
        with slowed(lan, say) if slow else _as_they_are() as links:
            try:
                lan.start(lambda name: say(f"{name} runs"))
                lan.meet(seconds=180)
                found = _train(lan, place, stages, replicas, steps, cheat, say)
                counters = lan.links.counters() if lan.links else None
            finally:
                lan.stop()
    finally:
        release()
        if path is None:
            shutil.rmtree(place, ignore_errors=True)
    return found | {"slow": slow, "links": {**links, "counters": counters}}


@contextmanager
def _as_they_are() -> Iterator[dict[str, Any]]:
    yield {"way": "loopback", "shape": "", "why": ""}


@contextmanager
def slowed(lan: Lan, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The daemons that `lan` starts within the block have links of SLOW: by network namespaces where they can be had,
    else by a shaper in each daemon. Says, and yields, which of the two, and why."""
    shape = parse_shaper(SLOW).others
    rate, delay_ns = round(8 * shape.bytes_per_second), round(1e9 * shape.delay_s)
    names = [one.member.name for one in lan.peers]
    try:
        links = LinkNamespaces.open(names, bits_per_second=rate, delay_ns=delay_ns, log=lan.path / "relay.log")
    except NoNamespaces as refusal:
        why = refusal.why or str(refusal)
        say(f"links of {SLOW}, by a shaper in each daemon: it knows no congestion. No network namespaces: {why}")
        os.environ["ICHIBA_SHAPE"] = SLOW
        try:
            yield {"way": "shaper", "shape": SLOW, "why": why}
        finally:
            os.environ.pop("ICHIBA_SHAPE", None)
        return
    try:
        lan.links = links
        why = "this process may make network namespaces, and packets passed between all of them"
        say(f"links of {SLOW}: each daemon in a network namespace of its own; a relay delays, queues and drops")
        yield {"way": "namespaces", "shape": SLOW, "why": why}
    finally:
        lan.links = None
        links.close()


def _train(
    lan: Lan, place: Path, stages: int, replicas: int, steps: int, cheat: str, say: Callable[[str], None]
) -> dict[str, Any]:
    job_dir = place / "job"
    job_dir.mkdir(parents=True)
    (job_dir / "model.py").write_text(MODEL.replace("LAYERS", str(max(2, stages))))
    terms = {"steps": steps, "per_segment": max(1, steps // 4), "stages": stages, "replicas": replicas}
    (job_dir / "job.toml").write_text(JOB.format(**terms))
    submitter = lan.of("submitter")
    began = time.monotonic()
    made = ichiba(["submit", str(job_dir), "--detach", "--json", "--data", submitter.data])
    job, client = json.loads(made.splitlines()[-1])["job"], submitter.client()
    offered, seen, launched_s, first_s = time.monotonic(), "", 0.0, 0.0
    while True:
        if lan.links is not None:
            lan.links.check()
        found = client.job(job)
        units = found["run"]["units"]
        now = ", ".join(f"{u['unit']}: {u['segments_done']} {u['deal'] or u['state']}" for u in units)
        if now != seen:
            say(f"{time.monotonic() - offered:5.1f} s  {now}")
            seen = now
        launched_s = launched_s or (time.monotonic() - offered if found["run"]["epoch"] else 0.0)
        first_s = first_s or (time.monotonic() - offered if found["segments_done"] else 0.0)
        if found["state"] in ("done", "failed", "cancelled"):
            break
        if time.monotonic() - offered > SECONDS_MAX:
            raise DemoFailed(f"the run is not over after {SECONDS_MAX:g} s", next_step="ichiba why JOB")
        time.sleep(LOOK_SECONDS)
    seconds = time.monotonic() - began
    caught = _caught(lan, client, found, cheat)
    for words in caught_words(caught):
        say(words)
    failures = [] if found["state"] == "done" else [f"the run {found['state']}: {found['reason']}"]
    guilty = sorted(lan.name_of(peer) for peer in found["culprits"])
    if guilty != [CHEAT] * bool(cheat) or {one["solver"] for one in caught} != set(guilty):
        who = ", ".join(guilty) or "nobody"
        failures.append(f"{who} was slashed, {len(caught)} with a place, and {CHEAT if cheat else 'nobody'} cheated")
    proofs = 0
    if found["state"] == "done":
        ichiba(["job", "get", job, "-o", str(place / "result"), "--data", submitter.data])
        proofs = len(units)
    wallet = client.command("wallet", all=True)
    honest = [d for d in found["deals"] if not (cheat and lan.name_of(d["solver"]) == CHEAT)]
    unpaid = [lan.name_of(d["solver"]) for d in honest if d["paid_micro"] != d["vouchers_micro"]]
    failures += [f"{name} was not paid all its vouchers" for name in unpaid]
    return {
        "job": job, "stages": stages, "replicas": replicas, "steps": steps, "segments": found["segments"],
        "placed": {d["solver"]: lan.name_of(d["solver"]) for d in found["deals"]},
        "launched_s": launched_s, "first_segment_s": first_s, "seconds": seconds, "proofs": proofs,
        "checked": sum(len(d["drawn"]) for d in found["deals"]), "paid_micro": found["paid_micro"],
        "spent_micro": found["spent_micro"], "total_micro": wallet["total_micro"], "failures": failures,
        "cheat": cheat, "caught": caught, "slashed_micro": found["slashed_micro"], "rewinds": found["run"]["rewinds"],
    }  # fmt: skip


def _caught(lan: Lan, client: Client, found: dict[str, Any], cheat: str) -> list[dict[str, Any]]:
    """Each deal that was slashed: whose, of which unit, and the first segment that checkers found wrong."""
    slashed = {d["deal"]: d for d in found["deals"] if d["state"] == "slashed"}
    told: dict[str, dict[str, Any]] = {}
    for event in client.events(found["job"]):
        if event["kind"] != "unit-verdict" or event["finding"] != "wrong" or event["deal"] not in slashed:
            continue
        unit = found["run"]["units"][event["unit"]]
        first = {"unit": unit["unit"], "stage": unit["stage"], "replica": unit["replica"], "checkers": []}
        one = told.setdefault(event["deal"], first | {"segment": event["wrong_segment"], "cheat": cheat})
        one["solver"] = lan.name_of(slashed[event["deal"]]["solver"])
        one["segment"] = min(one["segment"], event["wrong_segment"])
        one["checkers"].append(lan.name_of(event["checker"]))
    return list(told.values())


def caught_words(caught: list[dict[str, Any]]) -> list[str]:
    """Who was caught at what, a sentence each."""
    return [
        f"Caught: {one['solver']} had stage {one['stage']} of replica {one['replica']}, and its segment "
        f"{one['segment']} is wrong ({one['cheat']}): {' and '.join(one['checkers'])} repeated it from its checkpoint "
        "and its tape."
        for one in caught
    ]


def words_of(outcome: dict[str, Any]) -> str:
    """What happened, in plain sentences."""
    if outcome["failures"]:
        return "This went wrong: " + "; ".join(outcome["failures"]) + "."
    units = outcome["stages"] * outcome["replicas"]
    cheated = []
    if outcome["cheat"]:
        back = f"the run went back {outcome['rewinds']} time{'s' * (outcome['rewinds'] != 1)}"
        slashed = f"It lost {credits_of(outcome['slashed_micro'])} credits of stake and all pay; {back}, and others"
        cheated = [*caught_words(outcome["caught"]), f"{slashed} trained what it had spoilt again."]
    return " ".join(
        (
            f"Placed: {units} units at {units} solvers, launched {outcome['launched_s']:.0f} s after the offer.",
            f"Trained: {outcome['steps']} steps over {_links_words(outcome['links'])}, the first segment signed for by "
            f"all after {outcome['first_segment_s']:.0f} s.",
            *cheated,
            f"Verified: {outcome['checked']} segments of units were re-executed alone from their tapes, each bit of "
            f"the honest ones the same; {outcome['proofs']} proofs check offline.",
            f"Paid: {credits_of(outcome['paid_micro'])} credits to the solvers and "
            f"{credits_of(outcome['spent_micro'] - outcome['paid_micro'])} for checks; all accounts still add up.",
        )
    )


def _links_words(links: dict[str, Any]) -> str:
    if links["way"] == "namespaces":
        counted = links["counters"]
        return (
            f"links of {links['shape']} between network namespaces (TCP met queues; {counted['dropped']} of "
            f"{counted['taken']} frames were dropped)"
        )
    if links["way"] == "shaper":
        return f"links of {links['shape']} by a shaper in each daemon (no network namespaces: {links['why']})"
    return "the links of this machine"
