"""Parallel jobs at the command line: offer one, and show its units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli_output import Terminal, credits_of, short_id, size_of, write_whole

if TYPE_CHECKING:
    from peer.client import Client
    from worker.prepare_parallel import PreparedRun

__all__ = ["collect_units", "offer_run", "prepare_units", "show_units"]


def prepare_units(terminal: Terminal, client: Client, job: Path, network: bytes) -> PreparedRun:
    """Capture a job that has [parallel] and cut it into its units, with the stages of that on stderr."""
    from peer.cli_stack import stacking
    from protocol.records import ROLE_SOLVER

    book = client.command("book")
    solvers = {ask["peer"] for ask in book["asks"] if int(ask["roles"]) & ROLE_SOLVER}
    with stacking(terminal, client) as below, terminal.progress() as live:
        bar = live.add_task("loading torch", total=None, note="") if live is not None else None

        def stage(text: str) -> None:
            if live is not None and bar is not None:
                live.update(bar, description=text)

        from worker.prepare_parallel import PEERS, prepare_run

        prepared = prepare_run(job, network, stage, below, peers=len(solvers) or PEERS)
    first, whole = prepared.units[0].stage, prepared.whole
    terminal.note(
        f"{whole.job.name}: {whole.parameters:,} parameters in {first.stages} stages by {first.replicas} replicas, "
        f"{prepared.operations / 1e9:.1f} giga-operations; a step moves {size_of(prepared.activation_bytes)} between "
        f"stages and {size_of(prepared.gradient_bytes)} between replicas"
    )
    return prepared


def offer_run(terminal: Terminal, client: Client, prepared: PreparedRun, terms: dict[str, Any]) -> dict[str, Any]:
    """Upload what the units are made of and offer them together. terms: money and needs, as `submit-run` has them."""
    from protocol.codec import encode

    whole, arrays = prepared.whole, dict[str, bytes]()
    for array in whole.arrays:
        with terminal.moving(f"data {array.name}") as moved:
            arrays[array.name] = client.put_blob(array.data, moved)
    units = []
    for number, unit in enumerate(prepared.units):
        with terminal.moving(f"unit {number}") as moved:
            program, state = client.put_blob(unit.program, moved), client.put_blob(unit.state, moved)
        task = prepared.make_task(number, program=program, arrays=arrays, state=state)
        memory = max(unit.memory_bytes, whole.job.require.memory_bytes)
        units.append(
            {
                "task": encode(task).hex(),
                "checkpoint_bytes": unit.checkpoint_bytes,
                "memory_bytes": memory,
                "kept": unit.kept,
            }
        )
    made = client.command(
        "submit-run",
        units=units,
        sandbox=whole.job.sandbox,
        activation_bytes=prepared.activation_bytes,
        gradient_bytes=prepared.gradient_bytes,
        **terms,
    )
    terminal.record("ichiba.job/1", made)
    terminal.say(
        f"job {short_id(made['job'])} is offered as {len(units)} units, which are awarded together: "
        f"{made['steps']} steps in {made['segments']} segments"
    )
    return made


def collect_units(
    terminal: Terminal, found: dict[str, Any], folder: Path, collect: Callable[[str, Path], None]
) -> None:
    """Write the weights of a finished run: those of all stages together, as its first replica has them, and each unit's
    own files with its proof, which is checked. A unit that was kept here has no deal, so nothing of it is proved.

    collect: of one unit's job, into a folder.
    """
    import numpy as np

    from peer.cli_money import check_proof
    from peer.home import Home
    from protocol import safetensors

    network = Home(terminal.data_dir).network()
    whole: dict[str, np.ndarray[Any, Any]] = {}
    for unit in found["run"]["units"]:
        place = folder / f"unit-{unit['unit']}"
        place.mkdir(parents=True, exist_ok=True)
        collect(unit["job"], place)
        if not unit["kept"]:
            check_proof(place / "proof.json", network.id)
        if not unit["replica"]:
            weights = safetensors.parse(memoryview((place / "weights.safetensors").read_bytes()))
            whole |= {name: array for name, array in weights.items() if not name.startswith("ichiba.")}
    write_whole(folder / "weights.safetensors", safetensors.write(whole))
    terminal.record("ichiba.result/1", {"job": found["job"], "directory": str(folder)})
    terminal.say(f"wrote {folder}/weights.safetensors, of {len(found['run']['units'])} units whose proofs are right")


def show_units(terminal: Terminal, found: dict[str, Any]) -> None:
    """The units of a run: who has each, how far it is, and for whom it waits. Nothing for any other job."""
    run = found.get("run")
    if not run:
        return
    terminal.table(
        "units",
        (">unit", "stage", "replica", "job", "solver", "state", ">segments", "waits for", ">spent", "because"),
        [
            (
                unit["unit"],
                unit["stage"],
                unit["replica"],
                short_id(unit["job"]),
                "this peer" if unit["kept"] else unit["solver"][-8:] or "-",
                f"{unit['state']} {unit['deal']}".strip(),
                unit["segments_done"],
                ", ".join(map(str, unit["waiting_for"])) or "-",
                credits_of(unit["spent_micro"]),
                unit["reason"],
            )
            for unit in run["units"]
        ],
    )
