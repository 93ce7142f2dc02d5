"""The `job` group: list, show, follow, cancel and collect jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, ago, common, credits_of, short_id, write_whole
from peer.cli_proof import proof
from protocol.errors import IchibaError
from protocol.money_line import MoneyLine

if TYPE_CHECKING:
    from peer.client import Client

__all__ = ["job"]


class _NotDone(IchibaError):
    """The job has no result to collect."""

    code = "not-done"

    def __init__(self, found: dict[str, Any]) -> None:
        name = short_id(found["job"])
        super().__init__(
            f"job {name} is {found['state']}, so it has no result",
            why=found["reason"] or f"{found['steps_done']} of {found['steps']} steps are done",
            next_step=f"ichiba job logs -f {name}" if found["state"] in ("offered", "running") else "",
        )
        self.exit_code = {"failed": 6, "cancelled": 7}.get(found["state"], 1)


@click.group()
def job() -> None:
    """List, show, follow, cancel and collect jobs.

    A JOB is named by its id or any unambiguous beginning of it.
    """


job.add_command(proof)


@job.command()
@common
def ls(terminal: Terminal) -> None:
    """List all jobs of this peer, the newest first.

    \b
    ichiba job ls
    ichiba job ls --json
    """
    with terminal.client() as client:
        found = client.jobs()
    for one in found:
        terminal.record("ichiba.job/1", one)
    terminal.table(
        "jobs",
        ("job", "name", "state", ">steps", ">spent", ">of", "submitted", "because"),
        [
            (
                short_id(one["job"]),
                one["name"],
                one["stage"] or one["state"] if one["state"] == "running" else one["state"],
                f"{one['steps_done']}/{one['steps']}",
                credits_of(one["spent_micro"]),
                credits_of(one["budget_micro"]),
                ago(one["created_ns"]),
                one["reason"],
            )
            for one in found
        ],
    )


@job.command()
@click.argument("job_id", metavar="JOB")
@common
def show(terminal: Terminal, job_id: str) -> None:
    """Show one job with its deals and their checks, and what it found if it evaluates, infers or generates.

    \b
    ichiba job show 3f2a
    """
    from peer.cli_result import show_results
    from peer.cli_run import show_units

    with terminal.client() as client:
        found = client.job(job_id.lower())
        terminal.record("ichiba.job/1", found)
        _show_job(terminal, found)
        show_units(terminal, found)
        show_results(terminal, client, found)


def _privacy(found: dict[str, Any]) -> str:
    """Who was given what to open a sealed job; what somebody was given cannot be taken back."""
    held = [f"{key['peer'][-8:]} ({key['role']}: {key['opens']})" for key in found["keys"]]
    return f"sealed; keys given to {', '.join(held) or 'nobody yet'}"


def _show_job(terminal: Terminal, found: dict[str, Any]) -> None:
    terminal.pairs(
        {
            "job": found["job"],
            "name": found["name"],
            "kind": found.get("kind", "train"),
            "state": f"{found['state']} {found['stage']}".strip() + (f": {found['reason']}" if found["reason"] else ""),
            "progress": f"{found['steps_done']} of {found['steps']} steps, "
            f"{found['segments_done']} of {found['segments']} segments",
            "budget": f"{credits_of(found['budget_micro'])} credits, {credits_of(found['spent_micro'])} spent, "
            f"{credits_of(found['paid_micro'])} of it to solvers",
            **({"money": MoneyLine(**found["money"]).words()} if "money" in found else {}),
            "submitted": ago(found["created_ns"]),
            "final state": found["final_root"] or "-",
        }
        | ({"assurance": found["assurance"]} if found.get("assurance") else {})
        | ({"privacy": _privacy(found)} if found.get("privacy") == "sealed" else {})
        | ({"profiling": _profiling(found["profiling"])} if found.get("profiling") else {})
        | ({"replicas": _replicas(found["replicas"])} if found.get("replicas") else {})
    )
    terminal.table(
        "deals",
        ("deal", "solver", "segments", "state", ">receipts", ">vouchers", ">paid", "note"),
        [
            (
                short_id(deal["deal"]),
                deal["solver"][-8:],
                f"{deal['segments'][0]}-{deal['segments'][1] - 1}",
                deal["state"],
                deal["receipts"],
                credits_of(deal["vouchers_micro"]),
                credits_of(deal["paid_micro"]),
                deal["note"],
            )
            for deal in found["deals"]
        ],
    )
    checks = [(deal, check) for deal in found["deals"] for check in deal["checks"]]
    if checks:
        terminal.table(
            "checks",
            ("deal", "checker", "role", "segments", "finding"),
            [
                (
                    short_id(deal["deal"]),
                    check["checker"][-8:],
                    check["role"],
                    ", ".join(map(str, check["segments"])),
                    check["state"],
                )
                for deal, check in checks
            ],
        )


def _profiling(found: dict[str, Any]) -> str:
    from peer.cli_events import tolerance_of

    done = [one for one in found["profiles"] if one["state"] == "done"]
    spent = credits_of(sum(one["spent_micro"] for one in found["profiles"]))
    if "l1_ppb" not in found:
        return f"{len(done)} of {max(found['wanted'], len(found['profiles']))} profiles are done, {spent} credits spent"
    return f"{tolerance_of(found)}; by {', '.join(name[-8:] for name in found['profiled_by'])} for {spent} credits"


def _replicas(found: dict[str, Any]) -> str:
    same = {None: "not to compare yet", True: "their outputs agree", False: "their outputs DIFFER"}[found["same"]]
    return f"{found['ended']} of {found['count']} have ended; {same}"


@job.command()
@click.argument("job_id", metavar="JOB")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job ends; Ctrl-C detaches.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="With -f: no longer than this.")
@common
def logs(terminal: Terminal, job_id: str, following: bool, timeout: float | None) -> None:
    """Print what happened to a job, and with -f what happens.

    \b
    ichiba job logs 3f2a
    ichiba job logs -f 3f2a
    """
    from peer.cli_events import stamped
    from peer.cli_follow import follow

    with terminal.client() as client:
        found = client.job(job_id.lower())
        if following:
            click.get_current_context().exit(follow(terminal, client, found, timeout=timeout))
        for event in client.events(found["job"]):
            terminal.record("ichiba.event/1", event)
            terminal.say(stamped(event))


@job.command()
@click.argument("job_id", metavar="JOB")
@common
def cancel(terminal: Terminal, job_id: str) -> None:
    """Stop a job; what was done is checked and paid, the rest of the budget comes back.

    \b
    ichiba job cancel 3f2a
    """
    with terminal.client() as client:
        found = client.cancel(job_id.lower())
    terminal.record("ichiba.job/1", found)
    state = found["state"]
    words = "being cancelled: its receipts are checked and paid first" if state == "running" else state
    terminal.say(f"job {short_id(found['job'])} is {words}")


@job.command()
@click.argument("job_id", metavar="JOB")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Where to; else ./NAME-JOB.")
@common
def get(terminal: Terminal, job_id: str, output: Path | None) -> None:
    """Collect the result of a finished job, with its proof.

    Writes weights.safetensors (parameters and buffers), checkpoint.safetensors (the optimizer's state too: a later
    job can start from either), model.program and proof.json, and checks all before it says anything. A job that
    evaluates, infers or generates also leaves result.safetensors: its metrics, outputs or tokens, which are shown. A
    parallel job leaves the weights of all its stages together, and a folder with the proof of each unit.

    \b
    ichiba job get 3f2a -o result
    ichiba receipts verify result
    """
    from peer.cli_money import check_proof, show_proof

    with terminal.client() as client:
        found = client.job(job_id.lower())
        if found["state"] != "done":
            raise _NotDone(found)
        folder = output or Path(f"{_plain(found['name'])}-{found['job'][:8]}")
        folder.mkdir(parents=True, exist_ok=True)
        if found.get("kind") == "script":
            from peer.cli_script import collect_script

            collect_script(terminal, client, found["job"], folder)
        elif found.get("run"):
            from peer.cli_run import collect_units

            collect_units(terminal, found, folder, lambda job, where: collect(terminal, client, job, where))
            return
        else:
            collect(terminal, client, found["job"], folder)
    from peer.home import Home

    network = Home(terminal.data_dir).network()
    report, files = check_proof(folder / "proof.json", network.id)
    terminal.record("ichiba.result/1", {"job": found["job"], "directory": str(folder)})
    if found.get("kind") != "script":
        terminal.say(f"wrote {folder}/weights.safetensors, checkpoint.safetensors and proof.json")
    show_proof(terminal, report, files)


def _plain(name: str) -> str:
    """A job's name as a file name; names come from files people pass around."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:60] or "job"


def collect(terminal: Terminal, client: Client, job_id: str, folder: Path) -> None:
    """Write the files. The weights come out of the checkpoint, so one root vouches for both."""
    import json
    import mmap

    from peer.cli_result import collect_results
    from peer.home import Home
    from protocol import merkle, safetensors
    from protocol.bundle import make_bundle
    from protocol.program import Program, state_layout
    from protocol.task import TaskSpec

    home = Home(terminal.data_dir)
    evidence = client.bundle(job_id)
    task = TaskSpec.from_bytes(bytes.fromhex(evidence["task"]), network=home.network().id)
    checkpoint, graph = folder / "checkpoint.safetensors", folder / "model.program"
    with terminal.moving("checkpoint") as moved:
        client.get_blob(bytes.fromhex(evidence["checkpoint"]), checkpoint, moved)
    client.get_blob(task.program, graph)
    program = Program.from_bytes(graph.read_bytes())
    # Mapped, not read: a checkpoint may be larger than the memory.
    with checkpoint.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = safetensors.parse(memoryview(data), state_layout(program))
    kept = {item.name for item in program.inputs_of("parameter", "buffer")}
    weights = safetensors.write({name: array for name, array in tensors.items() if name in kept})
    write_whole(folder / "weights.safetensors", weights)
    collect_results(terminal, tensors, folder)
    roots = {name: merkle.tensor_root(array) for name, array in tensors.items()}
    bundle = make_bundle(evidence, network=home.network_file.read_text(), state=roots)
    write_whole(folder / "proof.json", json.dumps(bundle, indent=1).encode() + b"\n")
