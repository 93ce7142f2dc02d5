"""Lost and new peers, of benchmarks/parallel.py: a killed one is replaced, one joins, and both once a minute.

Beside the peers that have units stands a keeper, who has the checkpoint of each unit's last segment, as the submitter
has it, and gives it over a link like any other. A spare peer has a worker ready, as one that bids has. What the market
would decide (who replaces whom) is decided here at once; that a peer is gone its neighbours' links tell.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from parallel_fleet import Fleet, Process, Run
from parallel_job import FOUR_EIGHT, Job, gpt, text_rows, whole_files
from parallel_throughput import CONTEXT, EXAMPLES, MODEL, SHAPES, TINY

TEN_MILLION = {"context": CONTEXT, "width": 372, "layers": 6, "heads": 6}
LINKS = "100 Mbps"
KILL_SEGMENTS, KILL_LOCAL_STEPS = 3, 4
KILLED_UNIT = 1  # the first stage of the second replica
KILLED_AFTER = 1  # steps of the second segment that all have done
CHURN_MINUTES = 10
CHURN_STEPS_PER_SEGMENT = 4
CHURN_CALM_SEGMENTS = 4  # whose rate the churn is compared with


def job(name: str, *, segments: int, per_segment: int, tiny: bool, twin: str = "") -> Job:
    """A run of the model of the throughput part."""
    return Job(
        name, gpt(rows=1, **(TINY if tiny else MODEL)), text_rows(EXAMPLES, CONTEXT), stages=2, replicas=2,
        micro_batches=8, in_flight=4, sync="local", codecs=FOUR_EIGHT, steps=segments * per_segment,
        steps_per_segment=per_segment, twin=twin,
    )  # fmt: skip


class Kept:
    """The keeper's checkpoints: of each unit, the last segment that all ended, as (blob, who has it, bytes)."""

    def __init__(self, fleet: Fleet, keeper: Process, run: Run) -> None:
        self.fleet, self.keeper, self.run = fleet, keeper, run
        self.base: dict[int, tuple[str, str, int]] = {}
        self.segment = 0  # that these are the beginnings of

    def take(self, segment: int) -> None:
        """All units ended `segment`."""
        for unit, end in sorted(self.run.ends[segment].items()):
            (kept,) = self.fleet.ask([self.keeper], "keep", "kept", path=end["checkpoint"])
            self.base[unit] = kept["blob"], self.keeper.peer, end["checkpoint_bytes"]
        self.segment = segment + 1

    def give(self, unit: int, to: Process, before_step: int) -> None:
        """`to` takes `unit` over, and the others are told."""
        run = self.run
        run.epochs[unit] += 1
        run.at[unit] = to
        for process in {one for one in run.at if one is not to}:
            process.tell("replace", run=run.name, unit=unit, peer=to.peer, epoch=run.epochs[unit])
        to.tell(
            "unit", run=run.name, unit=str(run.units[unit].told), seats=run.seats(), before_step=before_step,
            epoch=run.epochs[unit], first_segment=self.segment, base=self.base[unit],
        )  # fmt: skip


def all_did(run: Run, step: int) -> bool:
    """Whether every unit has done a step."""
    return all(run.stepped[unit].get(step) for unit in range(len(run.units)))


def kill(folder: Path, *, tiny: bool, say: Any) -> dict[str, Any]:
    """A run that loses a peer, beside the same run that loses none."""
    with Fleet(folder) as fleet:
        processes = fleet.start(6)
        solvers, keeper, spare = processes[:4], processes[4], processes[5]
        sizes = {"segments": KILL_SEGMENTS, "per_segment": KILL_LOCAL_STEPS, "tiny": tiny}
        calm = fleet.launch(job("calm", **sizes), solvers)
        fleet.shape(SHAPES[LINKS])
        seconds = [fleet.segment(calm, segment) for segment in range(KILL_SEGMENTS)]
        say(f"undisturbed segments took {', '.join(f'{one:.1f}' for one in seconds)} s")
        for unit, process in enumerate(solvers):
            fleet.ask([process], "stop", "stopped", run="calm", unit=unit)
        fleet.ask([spare], "warm", "warm")
        run = fleet.launch(job("killed", twin="calm", **sizes), solvers)
        kept = Kept(fleet, keeper, run)
        fleet.segment(run, 0)
        kept.take(0)
        first, end = KILL_LOCAL_STEPS, KILL_SEGMENTS * KILL_LOCAL_STEPS
        fleet.go(run, end)
        last = first + KILLED_AFTER - 1
        fleet.until(lambda: all_did(run, last), f"step {last} is done")
        heard = len(fleet.heard)
        killed = fleet.kill(run.at[KILLED_UNIT])
        fleet.until(lambda: lost(fleet, run, KILLED_UNIT, heard), "its neighbours miss it")
        missed = time.monotonic()
        done = max(step for step in range(end) if all_did(run, step))
        kept.give(KILLED_UNIT, spare, end)
        fleet.until(lambda: all_did(run, done + 1), "the next step is done")
        following = max(run.stepped[unit][done + 1][0] for unit in range(4)) - killed
        say(f"killed after step {done}; missed after {missed - killed:.2f} s; next step after {following:.1f} s")
        fleet.until(lambda: len(run.ends[KILL_SEGMENTS - 1]) == 4, "the run ends")
        fetched = [event["t"] - killed for event in fleet.heard if event["kind"] == "fetched"][-1]
        after = {"missed": missed - killed, "fetched": fetched, "replayed": run.stepped[KILLED_UNIT][done][1] - killed,
                 "next step": following}  # fmt: skip
        return kill_figures(run, calm, after, seconds, end)


def lost(fleet: Fleet, run: Run, unit: int, first: int) -> bool:
    """Whether a neighbour missed who has the unit, of what was heard from `first` on."""
    peer = run.at[unit].peer
    return any(
        event["kind"] == "lost" and event["run"] == run.name and event["peer"] == peer for event in fleet.heard[first:]
    )


def kill_figures(run: Run, calm: Run, after: dict[str, float], seconds: list[float], end: int) -> dict[str, Any]:
    """What a kill cost. after: seconds from it. Steps lost: that those who lived had to do again; what the new peer
    replays is told beside."""
    again = {
        unit: sum(len(times) - 1 for times in run.stepped[unit].values()) for unit in range(4) if unit != KILLED_UNIT
    }
    replayed = sum(len(times) - 1 for times in run.stepped[KILLED_UNIT].values())
    ends, others = run.ends[KILL_SEGMENTS - 1], calm.ends[KILL_SEGMENTS - 1]
    final, undisturbed = (sum(one.losses[unit][end - 1] for unit in (2, 3)) / 2 for one in (run, calm))
    return {
        "kill_next_step_seconds": round(after["next step"], 2),
        "kill_steps_lost": max(again.values()),
        "kill_final_loss_ratio": round(final / undisturbed, 6),
        "kill": {
            "links": LINKS, "repeats": 1, "same_bits": all(ends[unit]["root"] == others[unit]["root"] for unit in ends),
            "seconds_after": {what: round(passed, 2) for what, passed in after.items()},
            "checkpoint_bytes": run.units[KILLED_UNIT].checkpoint_bytes, "steps_replayed_by_the_new_peer": replayed,
            "usual_step_seconds": round(sum(seconds[1:]) / (len(seconds) - 1) / KILL_LOCAL_STEPS, 2),
        },
    }  # fmt: skip


def join(folder: Path, *, tiny: bool, say: Any) -> dict[str, Any]:
    """From nothing but a warm worker to the first step: a model of ten million parameters with its Adam state."""
    whole = Job(
        "join", gpt(rows=1, **(TINY if tiny else TEN_MILLION)), text_rows(EXAMPLES, CONTEXT), 1, 1, 1, "none",
        FOUR_EIGHT, steps=1, steps_per_segment=1,
    )  # fmt: skip
    files = whole_files(whole, folder)
    with Fleet(folder) as fleet:
        keeper, joiner = fleet.start(2)
        (kept,) = fleet.ask([keeper], "keep", "kept", path=str(files.told.with_name("whole.base")))
        fleet.ask([joiner], "warm", "warm")
        fleet.shape(SHAPES[LINKS])
        began = time.monotonic()
        base = kept["blob"], keeper.peer, files.checkpoint_bytes
        joiner.tell("plain", order=str(files.told), name="joined", base=base)
        fleet.until(lambda: any(e["kind"] == "step" for e in fleet.heard), "the first step is done")
        (step,) = (event["t"] - began for event in fleet.heard if event["kind"] == "step")
        (fetched,) = (event["seconds"] for event in fleet.heard if event["kind"] == "fetched")
    say(f"joined with {whole.parameters} parameters in {step:.1f} s, of which {fetched:.1f} s fetched the state")
    return {
        "join_10m_parameters_100mbps_seconds": round(step, 2),
        "join": {
            "parameters": whole.parameters, "state_bytes": files.checkpoint_bytes, "fetch_seconds": round(fetched, 2),
            "load": os.getloadavg()[0],
        },
    }  # fmt: skip


def churn(folder: Path, *, tiny: bool, say: Any, minutes: int) -> dict[str, Any]:
    """A kill or a join each minute: a killed peer is replaced by the spare, and a new spare comes; one that joins takes
    a unit over from a peer that leaves it, at the end of a segment."""
    rng, per_segment = random.Random(7), CHURN_STEPS_PER_SEGMENT
    with Fleet(folder) as fleet:
        processes = fleet.start(6)
        keeper, spare = processes[4], processes[5]
        run = fleet.launch(job("churn", segments=1000, per_segment=per_segment, tiny=tiny), processes[:4])
        kept = Kept(fleet, keeper, run)
        fleet.shape(SHAPES[LINKS])
        fleet.ask([spare], "warm", "warm")
        for segment in range(2):
            fleet.segment(run, segment)
            kept.take(segment)
        began = time.monotonic()
        for segment in range(2, 2 + CHURN_CALM_SEGMENTS):
            fleet.segment(run, segment)
            kept.take(segment)
        calm = CHURN_CALM_SEGMENTS / (time.monotonic() - began)
        events: list[str] = []
        began, count = time.monotonic(), 0
        while (passed := time.monotonic() - began) < 60 * minutes:
            segment = kept.segment
            due = len(events) < passed / 60
            unit, act = rng.randrange(4), rng.choice(("kill", "join")) if due else ""
            if act == "join":
                fleet.ask([run.at[unit]], "stop", "stopped", run=run.name, unit=unit)
                kept.give(unit, spare, segment * per_segment + per_segment)
            fleet.go(run, segment * per_segment + per_segment)
            if act == "kill":
                fleet.until(lambda now=segment: all_did(run, now * per_segment), "a step is done")
                heard = len(fleet.heard)
                fleet.kill(run.at[unit])
                fleet.until(lambda gone=unit, since=heard: lost(fleet, run, gone, since), "its neighbours miss it")
                kept.give(unit, spare, segment * per_segment + per_segment)
            if act:
                (spare,) = fleet.start(1)
                fleet.shape(SHAPES[LINKS])
                spare.tell("warm")
                events.append(act)
            fleet.segment(run, segment)
            kept.take(segment)
            count += 1
        rate = count / (time.monotonic() - began)
    say(f"{len(events)} events ({', '.join(events)}): {rate / calm:.2f} of the throughput")
    return {
        "churn_throughput_kept": round(rate / calm, 3),
        "churn": {"minutes": minutes, "events": events, "segments": count, "calm_segments_per_second": round(calm, 4)},
    }
