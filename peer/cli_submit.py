"""Commands that spend: quote a job, submit it, and follow it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_market import show_ladder
from peer.cli_output import CREDITS, SIZE, Terminal, common, credits_of, short_id, size_of
from peer.cli_run import offer_run, prepare_units
from protocol.errors import IchibaError

if TYPE_CHECKING:
    from peer.client import Client
    from worker.job_file import JobFile
    from worker.prepare import Prepared
    from worker.prepare_parallel import PreparedUnit

__all__ = ["prepare_job", "quote", "submit"]

_JOB_PATH = click.Path(exists=True, path_type=Path)


class _NoTerms(IchibaError):
    """Neither job.toml nor the command line says what the job may cost."""

    code = "usage"
    exit_code = 2


@click.command()
@click.argument("job", type=_JOB_PATH)
@click.option("--budget", type=CREDITS, help="The most you pay for all of it, in credits; else what job.toml says.")
@click.option("--price", type=CREDITS, help="The most you pay per giga-operation, in credits; else what job.toml says.")
@click.option(
    "--device", type=click.Choice(["any", "cpu", "gpu"]), help="What it must run on; else what job.toml says."
)
@click.option("--vram", type=SIZE, help="The memory its graphics card must have, as in 24G.")
@click.option("--deadline", metavar="SPAN|TIME", help="When it must be done: 2h, 90m, or a time with its zone.")
@click.option("--sealed", is_flag=True, help="Show terms only; who wins it gets the keys to the rest.")
@click.option("--credit", is_flag=True, help="Owe it to a solver that gives you a credit line; nobody checks the work.")
@click.option("--wait/--detach", default=True, help="Follow the job to its end (the default), or return at once.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Follow no longer than this.")
@common
def submit(
    terminal: Terminal,
    job: Path,
    budget: int | None,
    price: int | None,
    device: str | None,
    vram: int | None,
    deadline: str | None,
    sealed: bool,
    credit: bool,
    wait: bool,
    timeout: float | None,
) -> None:
    """Offer the job in JOB to the market and follow it.

    JOB is a job.toml or its directory (see examples/mlp). Your build() runs here, once; what is sent is the graph of
    one training step, never your Python. Ctrl-C detaches: the job goes on.

    \b
    ichiba submit examples/mlp
    ichiba submit examples/char_gpt --budget 5 --price 0.002 --timeout 3600
    ichiba submit examples/cnn --detach --json
    ichiba submit examples/mlp --sealed
    ichiba submit examples/mlp --deadline 2h --device cpu
    ichiba submit examples/mlp --credit
    """
    with terminal.client() as client:
        network = bytes.fromhex(client.status()["network_id"])  # before seconds of torch: is the daemon there?
        from peer.cli_script import offer_script
        from worker.job_file import JobFile
        from worker.script_file import read_any

        written = read_any(job)
        required = written.require.overridden(device=device, device_memory_bytes=vram, deadline=deadline)
        required.terms(time.time_ns())  # a deadline that is past is told before seconds of torch
        run = None
        if isinstance(written, JobFile) and written.parallel is not None:
            if sealed or credit or written.sealed:
                raise click.UsageError("A parallel job can be neither sealed nor on credit.")
            run = prepare_units(terminal, client, written, network, required, price)
        graph = prepare_job(terminal, client, job, network) if isinstance(written, JobFile) and run is None else None
        budget_micro = budget if budget is not None else written.budget_micro
        unit_price_max = price if price is not None else written.unit_price_max
        if not budget_micro or not unit_price_max:
            raise _NoTerms(
                f"{'no budget' if not budget_micro else 'no price limit'} is given",
                why="there is no unlimited default",
                next_step="add --budget and --price, or set them in job.toml; `ichiba quote` shows the market",
            )
        if not isinstance(written, JobFile) and sealed:
            raise click.UsageError("A script cannot be sealed: nothing of it is checked by its task.")
        terms = {"budget_micro": budget_micro, "unit_price_max": unit_price_max} | required.terms(time.time_ns())
        if credit:
            terms["credit"] = True
        if run is not None:
            made = [offer_run(terminal, client, run, terms)]
        elif graph is not None:
            made = [_offer_graph(terminal, client, graph, terms, sealed=sealed or graph.job.sealed)]
        else:
            assert not isinstance(written, JobFile), "a graph was prepared"
            made = offer_script(terminal, client, written, network, terms)
        if credit:
            terminal.say("it is on credit: who does it is owed for it, and nobody checks the work; `ichiba credit ls`")
        _follow_all(terminal, client, made, wait=wait, timeout=timeout)


def _offer_graph(
    terminal: Terminal, client: Client, prepared: Prepared, terms: dict[str, Any], *, sealed: bool
) -> dict[str, Any]:
    """Upload what a graph job is made of and offer it. terms: money and needs, as `Client.submit` has them."""
    made = client.submit(
        task=_upload(terminal, client, prepared, sealed=sealed),
        base_root=prepared.base_root,
        checkpoint_bytes=prepared.checkpoint_bytes,
        memory_bytes=max(prepared.memory_bytes, prepared.job.require.memory_bytes),
        sandbox=prepared.job.sandbox,
        sealed=sealed,
        **terms,
    )
    terminal.record("ichiba.job/1", made)
    terminal.say(f"job {short_id(made['job'])} is offered: {made['steps']} steps in {made['segments']} segments")
    if sealed:
        terminal.say("it is sealed: peers see its terms; `ichiba job show` says who holds its keys")
    return made


def _follow_all(
    terminal: Terminal, client: Client, jobs: list[dict[str, Any]], *, wait: bool, timeout: float | None
) -> None:
    """Follow the jobs to their ends one after the other, and exit with the worst of their codes; or say how to."""
    if not wait:
        for made in jobs:
            terminal.say(f"next: ichiba job logs -f {short_id(made['job'])}")
        return
    from peer.cli_follow import follow

    click.get_current_context().exit(max([follow(terminal, client, made, timeout=timeout) for made in jobs]))


def prepare_job(terminal: Terminal, client: Client, job: Path, network: bytes) -> Prepared:
    """Capture the job, with its stages on stderr."""
    from peer.cli_stack import stacking
    from protocol.task import FIGURES
    from worker.job_file import read_job_file

    read_job_file(job)  # a mistake in it is told before seconds of importing torch
    with stacking(terminal, client) as below, terminal.progress() as live:
        bar = live.add_task("loading torch", total=None, note="") if live is not None else None

        def stage(text: str) -> None:
            if live is not None and bar is not None:
                live.update(bar, description=text)

        from worker.prepare import prepare

        prepared = prepare(job, network, stage, below)
    figure = FIGURES[prepared.job.kind]
    loss = f", first {figure} {prepared.first_loss:.4f}" if figure and prepared.first_loss is not None else ""
    terminal.note(
        f"{prepared.job.name}: {prepared.parameters:,} parameters, {prepared.nodes} nodes, "
        f"{prepared.operations / 1e9:.1f} giga-operations, {size_of(prepared.memory_bytes)} of memory{loss}"
    )
    if prepared.stack is not None:
        fresh = ", ".join(prepared.stack.fresh)[:200]
        terminal.note(
            f"{len(prepared.stack.taken)} weights are those the job below ended with"
            + (f"; drawn from the seed: {fresh}" if fresh else "")
        )
    return prepared


def _upload(terminal: Terminal, client: Client, prepared: Prepared, *, sealed: bool) -> bytes:
    """Put the job's blobs into the daemon's store; the encoded task that names them."""
    from protocol.codec import encode

    with terminal.moving("program") as moved:
        program = client.put_blob(prepared.program, moved, sealed=sealed)
    arrays: dict[str, bytes] = {}
    for array in prepared.arrays:
        with terminal.moving(f"data {array.name}") as moved:
            arrays[array.name] = client.put_blob(array.data, moved, sealed=sealed)
    base = b""
    if prepared.base is not None:
        with terminal.moving("first checkpoint") as moved:
            base = client.put_blob(prepared.base, moved, sealed=sealed)
    return encode(prepared.make_task(program=program, arrays=arrays, base=base))


@click.command()
@click.argument("job", type=_JOB_PATH, required=False)
@click.option("--operations", type=click.IntRange(min=1), help="Instead of a job: its number of operations.")
@click.option("--price", type=CREDITS, help="Your limit per giga-operation, in credits: who is left out by it.")
@click.option("--memory", type=SIZE, default=0, help="With --operations: the memory a solver must have, as in 2G.")
@click.option(
    "--device", type=click.Choice(["any", "cpu", "gpu"]), help="What it must run on; else what job.toml says."
)
@click.option("--vram", type=SIZE, help="The memory its graphics card must have, as in 24G.")
@common
def quote(
    terminal: Terminal,
    job: Path | None,
    operations: int | None,
    price: int | None,
    memory: int,
    device: str | None,
    vram: int | None,
) -> None:
    """Show what a job would cost, and how long it would take.

    From the asks this peer has heard; nothing is offered and nothing is spent. For several price limits: how many
    solvers each reaches, how many of them are free, how long until one takes the job (an estimate, "?" where nothing
    tells), how long it runs, and what it costs with all its checks.

    \b
    ichiba quote examples/mlp
    ichiba quote --operations 5000000000000 --price 0.002
    """
    if (job is None) == (operations is None):
        raise click.UsageError("Give a JOB or --operations, one of them.")
    from worker.require import Require

    sandbox, segments, per_segment, units = 2, 0, 0, 0  # FILTERED, what any graph needs
    required = Require()
    with terminal.client() as client:
        if job is not None:
            written, known, units = _known_of(terminal, client, job, device, vram, price)
            required = written.require
            memory = max(known.memory_bytes, required.memory_bytes)
            operations, sandbox = known.operations_per_step * written.steps, written.sandbox
            price = price if price is not None else written.unit_price_max
            segments = -(-written.steps // written.steps_per_segment)
            per_segment = known.operations_per_step * written.steps_per_segment
        assert operations is not None
        required = required.overridden(device=device, device_memory_bytes=vram, deadline=None)
        found = client.quote(
            operations=operations, unit_price_max=price, memory_bytes=memory, sandbox=sandbox,
            segments=segments, operations_per_segment=per_segment,
            device=required.device, device_memory_bytes=required.device_memory_bytes,
        )  # fmt: skip
    of_units = {"units": units} if units else {}
    terminal.record("ichiba.quote/1", {**found, **of_units, "unit_price_max": price, "memory_bytes": memory})
    if units:
        terminal.note(f"the figures are of one of {units} units, the largest; each has a solver of its own")
    _show_quote(terminal, found, price)


def _known_of(
    terminal: Terminal, client: Client, job: Path, device: str | None, vram: int | None, price: int | None
) -> tuple[JobFile, Prepared | PreparedUnit, int]:
    """A job, what is known of its work, and 0; of a parallel one what is known of its largest unit, and how many it
    has."""
    from worker.job_file import read_job_file

    network = bytes.fromhex(client.status()["network_id"])
    written = read_job_file(job)
    if written.parallel is None:
        return written, prepare_job(terminal, client, job, network), 0
    required = written.require.overridden(device=device, device_memory_bytes=vram, deadline=None)
    units = prepare_units(terminal, client, written, network, required, price).units
    return written, max(units, key=lambda unit: unit.operations_per_step), len(units)


def _show_quote(terminal: Terminal, found: dict[str, Any], price: int | None) -> None:
    terminal.say(f"{found['operations'] / 1e9:.1f} giga-operations")
    if not found["solvers"]:
        terminal.say("no solver that could run it is heard of; see `ichiba book`")
        return
    terminal.pairs(
        {
            "solvers": found["solvers"],
            "lowest": f"{credits_of(found['low_micro'])} credits",
            "median": f"{credits_of(found['median_micro'])} credits",
            "highest": f"{credits_of(found['high_micro'])} credits",
            "fastest": f"{found['fastest_seconds']:.0f} s of work" if found["fastest_seconds"] else "unknown",
        }
    )
    if price is not None and found["too_dear"]:
        terminal.say(
            f"your limit of {credits_of(price)} credits per giga-operation leaves out {found['too_dear']} of them; "
            f"{credits_of(found['limit_for_all'])} would reach all"
        )
    show_ladder(terminal, found)
