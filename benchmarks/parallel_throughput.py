"""Throughput on slow links, bytes on the wire and the cost of checks, of benchmarks/parallel.py.

Three runs of one model stand behind their gates at once, and each repeat lets a segment of each pass, so all variants
are measured in turns by the same processes:

- `ours`: AQ-SGD 4 bits forward, 8 backward, replicas that train alone for a segment and exchange int4 changes
- `float32, each step`: uncompressed, gradients averaged over the replicas in each step, as data parallel training does
- `float32, same sync`: as `ours` in everything but that nothing is compressed
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from parallel_fleet import Fleet, Process, Run
from parallel_job import FOUR_EIGHT, RAW, Job, gpt, text_rows
from verification_overhead import GOOD_STANDING, TICKS, Meter, checks_at

from protocol.incentives import check_rate
from protocol.network import Rules

SHAPES = {"unshaped": "", "100 Mbps": "50ms,100mbit", "10 Mbps": "50ms,10mbit"}
CONTEXT = 64
MODEL = {"context": CONTEXT, "width": 272, "layers": 6, "heads": 4}  # 5.4 million parameters
EXAMPLES = 16  # few, so that every one was seen once when measuring begins
TINY = {"context": CONTEXT, "width": 64, "layers": 2, "heads": 2}  # to try the benchmark itself
LOCAL_STEPS = 8
MICRO_BATCHES = 8  # of one row
WARM_SEGMENTS = 2
CHECK_SEGMENTS = 20  # of the job whose checks are added up


def jobs(repeats: int, *, tiny: bool, micro_batches: int, local_steps: int) -> dict[str, Job]:
    """The three runs."""
    plain: dict[str, Any] = {
        "captured": gpt(rows=1, **(TINY if tiny else MODEL)), "arrays": text_rows(EXAMPLES, CONTEXT), "stages": 2,
        "replicas": 2, "micro_batches": micro_batches, "in_flight": 4,
    }  # fmt: skip
    segments = WARM_SEGMENTS + len(SHAPES) * repeats + 2
    local = {"sync": "local", "steps_per_segment": local_steps}
    return {
        "ours": Job("ours", codecs=FOUR_EIGHT, steps=segments * local_steps, **local, **plain),
        "float32, each step": Job(
            "each-step", codecs=RAW, sync="step", steps=2 * repeats + 2, steps_per_segment=1, **plain
        ),
        "float32, same sync": Job("same-sync", codecs=RAW, steps=(repeats + 2) * local_steps, **local, **plain),
    }


class Measured:
    """Segments of the three runs, one after the other."""

    def __init__(self, fleet: Fleet, runs: dict[str, Run]) -> None:
        self.fleet, self.runs = fleet, runs
        self.next = Counter[str]()
        self.rates: dict[tuple[str, str], list[float]] = {}
        self.bytes: dict[str, Counter[str]] = {}
        self.load: list[float] = []

    def pass_segment(self, name: str, shape: str, *, counts: bool = True) -> None:
        """Measure the next segment of a run on links of a shape."""
        run = self.runs[name]
        self.fleet.shape(SHAPES[shape])
        segment, steps = self.next[name], len(run.units[0].task.steps_of(self.next[name]))
        seconds = self.fleet.segment(run, segment)
        self.next[name] += 1
        if counts:
            tokens = steps * run.job.rows * CONTEXT * run.job.replicas
            self.rates.setdefault((name, shape), []).append(tokens / seconds)
            sent = Counter[str]()
            for end in run.ends[segment].values():
                sent.update(end["sent"])
            self.bytes[name] = Counter({flow: count // steps for flow, count in sent.items()})
            self.load.append(os.getloadavg()[0])

    def median(self, name: str, shape: str) -> float:
        """Tokens a second."""
        return statistics.median(self.rates[name, shape])


def measure(folder: Path, *, repeats: int, tiny: bool, say: Any, **sizes: int) -> dict[str, Any]:
    """All of it. tiny: a model that is too small for the bars. sizes: as of `jobs`."""
    made = jobs(repeats, tiny=tiny, **sizes)
    with Fleet(folder) as fleet:
        processes = fleet.start(4)
        runs = {name: fleet.launch(job, processes) for name, job in made.items()}
        measured = Measured(fleet, runs)
        for _ in range(WARM_SEGMENTS):
            measured.pass_segment("ours", "unshaped", counts=False)
        for name in ("float32, each step", "float32, same sync"):
            measured.pass_segment(name, "unshaped", counts=False)
        say(f"warm; {made['ours'].parameters / 1e6:.2f} million parameters, {made['ours'].rows} rows of {CONTEXT}")
        for turn in range(repeats):
            names = list(SHAPES)
            for place in range(len(names)):
                measured.pass_segment("ours", names[(turn + place) % len(names)])
            measured.pass_segment("float32, each step", "10 Mbps")
            measured.pass_segment("float32, same sync", "10 Mbps")
            measured.pass_segment("float32, each step", "unshaped")
            say(f"repeat {turn + 1} of {repeats}: " + ", ".join(
                f"{name} at {shape} {rates[-1]:.0f} tokens/s" for (name, shape), rates in measured.rates.items()
            ))  # fmt: skip
        return figures(measured, repeats) | verification(fleet, runs["ours"], measured, processes, say)


def figures(measured: Measured, repeats: int) -> dict[str, Any]:
    """In the words of the issue's bars."""
    ours = {shape: measured.median("ours", shape) for shape in SHAPES}
    each, same = (measured.median(f"float32, {sync}", "10 Mbps") for sync in ("each step", "same sync"))
    wire = measured.bytes
    run = measured.runs["ours"]

    def fewer(flows: tuple[str, ...], other: str) -> float:
        return sum(wire[other][flow] for flow in flows) / max(1, sum(wire["ours"][flow] for flow in flows))

    pipeline = ("forward", "backward")
    outer = wire["float32, same sync"]["outer"] / max(1, wire["ours"]["outer"])
    return {
        "throughput": {
            "parameters": run.job.parameters, "stages": run.job.stages, "replicas": run.job.replicas,
            "tokens_per_step": run.job.rows * CONTEXT * run.job.replicas, "local_steps": run.job.steps_per_segment,
            "micro_batches": run.job.micro_batches,
            "repeats": repeats, "load": [min(measured.load), max(measured.load)],
            "tokens_per_second": {f"{n} at {s}": round(measured.median(n, s), 1) for n, s in measured.rates},
            "each": {f"{n} at {s}": [round(rate, 1) for rate in rates] for (n, s), rates in measured.rates.items()},
        },
        "throughput_100mbps_50ms_of_unshaped": round(ours["100 Mbps"] / ours["unshaped"], 3),
        "throughput_10mbps_50ms_of_unshaped": round(ours["10 Mbps"] / ours["unshaped"], 3),
        "throughput_10mbps_50ms_over_uncompressed": round(ours["10 Mbps"] / same, 3),
        "throughput_10mbps_50ms_over_uncompressed_sync_each_step": round(ours["10 Mbps"] / each, 3),
        "bytes_on_the_wire_per_step": {name: dict(sorted(counts.items())) for name, counts in wire.items()},
        "bytes_on_the_wire_fewer": {
            "forward and backward": round(fewer(pipeline, "float32, same sync"), 2),
            "forward": round(fewer(("forward",), "float32, same sync"), 2),
            "backward": round(fewer(("backward",), "float32, same sync"), 2),
            "outer": round(outer, 2),
            "all, sync each step": round(wire["float32, each step"].total() / wire["ours"].total(), 1),
        },
    }  # fmt: skip


# --- checks ----------------------------------------------------------------------------------------------------------
def used(pid: int) -> dict[int, float]:
    """Processor seconds of a process and of each that descends from it and lives."""
    found: dict[int, float] = {}
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{one}/task").iterdir():
                todo.extend(map(int, (task / "children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[one] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def more(after: dict[int, float], before: dict[int, float]) -> float:
    """What was used between two looks by those that live at the second."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def verification(
    fleet: Fleet, run: Run, measured: Measured, processes: list[Process], say: Any, *, turns: int = 2
) -> dict[str, Any]:
    """What it costs to compute a unit's segment again from its tape, beside what the segment cost.

    Processor seconds, of the worker and its daemon, the start of the checker's worker and its reading of state and tape
    included; bringing them there is not.
    """
    shares: list[float] = []
    walls: list[float] = []
    for turn in range(turns):
        segment = measured.next["ours"]
        before = [used(process.process.pid) for process in processes]
        measured.pass_segment("ours", "unshaped", counts=False)
        own = [more(used(process.process.pid), start) for process, start in zip(processes, before, strict=True)]
        for unit in (0, run.job.replicas):  # one of each stage
            process, name = processes[unit], f"check-{turn}-{unit}"
            base, end = run.ends[segment - 1][unit]["checkpoint"], run.ends[segment][unit]
            meter, first = Meter(process.process.pid), len(fleet.heard)
            with meter.watch():
                start = meter.seconds()
                process.tell(
                    "check", run=run.name, unit=str(run.units[unit].told), segment=segment, base=base,
                    tapes=[end["tape"]], name=name,
                )  # fmt: skip
                done = _answer(fleet, first, name, "done")
            found = _answer(fleet, first, name, "segment")
            assert found["root"] == end["root"], "a checker comes to the same bits"
            Path(found["checkpoint"]).unlink()
            shares.append((meter.seconds() - start) / own[unit])
            walls.append(done["seconds"])
    ratio, rules = statistics.median(shares), Rules()
    rates = {"good standing": check_rate(rules, GOOD_STANDING), "newcomer": check_rate(rules, 0)}
    overhead = {
        who: ratio * checks_at(permille, CHECK_SEGMENTS, rules) / CHECK_SEGMENTS for who, permille in rates.items()
    }
    say(f"a check takes {ratio:.2f} of its segment; at {rates} permille it adds {overhead}")
    return {
        "verification_overhead_of_a_parallel_job": round(overhead["good standing"], 4),
        "verification_overhead_of_a_newcomer": round(overhead["newcomer"], 4),
        "verification": {
            "check_over_segment": [round(share, 3) for share in shares], "check_seconds": [round(w, 2) for w in walls],
            "rate_permille": rates, "segments": CHECK_SEGMENTS, "audits_permille": rules.audit_permille,
        },
    }  # fmt: skip


def _answer(fleet: Fleet, first: int, name: str, kind: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [event for event in fleet.heard[first:] if event.get("run") == name and event["kind"] == kind]

    fleet.until(found, f"{name} is {kind}")
    return found()[0]
