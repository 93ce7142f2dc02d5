"""Parallel jobs at the command line: offer one, and show its units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli_output import Terminal, credits_of, short_id, size_of, write_whole

if TYPE_CHECKING:
    from peer.client import Client
    from protocol.run_sizes import RunSizes
    from worker.job_file import JobFile
    from worker.prepare_parallel import PreparedRun
    from worker.require import Require

_PLAN_KEYS = (
    "guessed", "links_known", "links_used", "peers", "step_s", "compute_s", "borders_s", "exchange_s", "quickest_s",
    "tolerance_permille",
)  # fmt: skip

__all__ = ["collect_units", "offer_run", "prepare_units", "show_units"]


def prepare_units(
    terminal: Terminal, client: Client, written: JobFile, network: bytes, required: Require, price: int | None
) -> PreparedRun:
    """Capture a job that has [parallel] and cut it into its units, with the stages of that on stderr. How their tensors
    travel is chosen by the daemon, which knows the links; what it chose and why is told.

    required, price: what a solver must have, and the limit, as the command line has it.
    """
    import msgspec

    from peer.cli_stack import stacking
    from protocol.records import ROLE_SOLVER
    from protocol.run_sizes import RunChoice

    plan: dict[str, Any] = {}
    needs = {
        "unit_price_max": price if price is not None else written.unit_price_max or 0,
        "memory_bytes": required.memory_bytes,
        "sandbox": written.sandbox,
        "device": required.device,
        "device_memory_bytes": required.device_memory_bytes,
    }

    def choose(sizes: RunSizes) -> RunChoice:
        found = client.command("plan-run", sizes=msgspec.to_builtins(sizes), **needs)
        plan.update(_spelt(sizes, found))
        return msgspec.convert(found["choice"], RunChoice)

    book = client.command("book")
    solvers = {ask["peer"] for ask in book["asks"] if int(ask["roles"]) & ROLE_SOLVER}
    with stacking(terminal, client) as below, terminal.progress() as live:
        bar = live.add_task("loading torch", total=None, note="") if live is not None else None

        def stage(text: str) -> None:
            if live is not None and bar is not None:
                live.update(bar, description=text)

        from worker.prepare_parallel import PEERS, prepare_run

        prepared = prepare_run(written.path, network, stage, below, choose=choose, peers=len(solvers) or PEERS)
    first, whole = prepared.units[0].stage, prepared.whole
    terminal.note(
        f"{whole.job.name}: {whole.parameters:,} parameters in {first.stages} stages by {first.replicas} replicas, "
        f"{prepared.operations / 1e9:.1f} giga-operations; a step moves {size_of(prepared.activation_bytes)} between "
        f"stages and {size_of(prepared.gradient_bytes)} between replicas"
    )
    _show_plan(terminal, plan)
    return prepared


def _spelt(sizes: RunSizes, found: dict[str, Any]) -> dict[str, Any]:
    """The plan in the words of job.toml, with the modelled seconds of a step by each way that was open."""
    choice = found["choice"]
    ways, shares = [str(way) for way in sizes.compressions], sizes.shares
    return {
        "compress": [ways[way] for way in choice["compressions"]],
        "sync": shares[choice["share"]].sync if shares else "none",
        "share": str(shares[choice["share"]]) if shares else "none",
        "in_flight": choice["in_flight"],
        **{key: found[key] for key in _PLAN_KEYS},
        "by_compress": [
            {"compress": way, "step_s": seconds, "automatic": compress.automatic}
            for way, seconds, compress in zip(ways, found["compressions_s"], sizes.compressions, strict=True)
        ],
        "by_share": [
            {"sync": share.sync, "share": str(share), "step_s": seconds, "automatic": share.automatic}
            for share, seconds in zip(shares, found["shares_s"], strict=True)
        ],
    }


def _show_plan(terminal: Terminal, plan: dict[str, Any]) -> None:
    """What was chosen and why, in two lines on stderr; all of it under --json."""
    terminal.record("ichiba.run-plan/1", plan)
    borders = list(dict.fromkeys(plan["compress"]))
    words = [f'compress = "{borders[0]}"'] if len(borders) == 1 else []
    words += [f"compress by border {', '.join(plan['compress'])}"] if len(borders) > 1 else []
    words += [f'sync = "{plan["sync"]}"', f'share = "{plan["share"]}"'] if plan["by_share"] else []
    words += [f"in_flight = {plan['in_flight']}"] if plan["in_flight"] else []
    if plan["guessed"]:
        why = "as usual: nobody measured the links yet, so 50 ms and 10 Mbit/s are guessed"
    else:
        missing = plan["links_used"] - plan["links_known"]
        guess = f", {missing} of {plan['links_used']} guessed at 50 ms and 10 Mbit/s" if missing else ""
        why = (
            f"the least lossy within {plan['tolerance_permille'] / 10:g} % of the quickest "
            f"({_seconds(plan['quickest_s'])}) over the links that are expected{guess}"
        )
    terminal.note(f"{', '.join(words)}: {why}")
    terminal.note(
        f"a step is modelled at {_seconds(plan['step_s'])}: {_seconds(plan['compute_s'])} to compute, "
        f"{_seconds(plan['borders_s'])} between stages, {_seconds(plan['exchange_s'])} between replicas; "
        f"job.toml may say otherwise"
    )


def _seconds(seconds: float) -> str:
    """As people say it: two or three digits that count."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


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
        border_bytes=prepared.border_bytes,
        shared_bytes=prepared.shared_bytes,
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
