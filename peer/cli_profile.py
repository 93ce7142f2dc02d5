"""`ichiba profile`: how far honest runs of a job lie apart on this machine, and what tolerant mode would make of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, common

if TYPE_CHECKING:
    from protocol.profile import Findings
    from worker.profiling import Profiled

__all__ = ["profile"]


@click.command()
@click.argument("job", type=click.Path(exists=True, path_type=Path))
@common
def profile(terminal: Terminal, job: Path) -> None:
    """Measure whether tolerant mode would be safe for a job.

    JOB is a job.toml or its directory. How far honest runs of it lie apart is measured: the first two segments run here
    under five kernel configurations, and once with another seed: about as long as eleven segments. No daemon is asked
    and nothing is spent. Of a job whose mode is exact, which needs no threshold, only the speed is measured; --json
    says all that was.

    \b
    ichiba profile examples/mlp
    ichiba profile examples/char_gpt --json
    """
    from peer.cli_stack import stacking
    from worker.job_file import read_job_file

    read_job_file(job)  # a mistake in it is told before seconds of importing torch
    with tempfile.TemporaryDirectory(prefix="ichiba-profile-") as folder:
        with stacking(terminal, terminal.client()) as below, terminal.progress() as live:
            bar = live.add_task("loading torch", total=None, note="") if live is not None else None

            def stage(text: str) -> None:
                if live is not None and bar is not None:
                    live.update(bar, description=text)

            from worker.prepare import prepare
            from worker.profiling import profile_task

            prepared = prepare(job, bytes(32), stage, below)
            arrays = {array.name: array.data for array in prepared.arrays}
            task = prepared.make_task(
                program=_id_of(prepared.program), arrays=dict.fromkeys(arrays, bytes(32)), base=bytes(32)
            )
            found = profile_task(task, prepared.program, arrays, prepared.base, Path(folder), stage)
        _tell(terminal, prepared.job.mode, task.segments, found)


def _id_of(program: bytes) -> bytes:
    from protocol.program import program_id

    return program_id(program)


def _tell(terminal: Terminal, mode: str, segments: int, found: Profiled) -> None:
    from protocol.profile import ToleranceRefused, refuse_tolerance, tolerance_of

    values: dict[str, Any] = {"mode": mode, "operations_per_second": found.operations_per_second}
    refusal: dict[str, str] | None = None
    if found.findings is not None:
        tolerance = tolerance_of(found.findings)
        try:
            refuse_tolerance(tolerance, segments)
        except ToleranceRefused as error:
            refusal = error.as_dict()
        values |= {
            "threshold_l1_ppb": tolerance.l1_ppb,
            "threshold_l2_ppb": tolerance.l2_ppb,
            "segments": segments,
            "drift_ppb": segments * tolerance.l1_ppb,
            "other_seed_ppb": found.findings.other_seed_ppb,
            "kernels": [_plain(one) for one in found.findings.measured],
            "unmasked": [_plain(one) for one in found.findings.unmasked],
            "gauges": [_plain(gauge) for gauge in found.findings.gauges],
            "refused": refusal,
        }
    terminal.record("ichiba.profile/1", values)
    terminal.say(f"{found.operations_per_second / 1e9:.2f} giga-operations a second")
    if found.findings is None:
        terminal.say("exact mode: honest runs agree to the last bit, so there is no threshold to measure")
        return
    _tell_findings(terminal, found.findings, values)
    if refusal is not None:
        terminal.say(f"tolerant mode is refused: {'; '.join(filter(None, (refusal['what'], refusal['why'])))}")
        terminal.say(f"next: {refusal['next']}")
    else:
        terminal.say("tolerant mode would be accepted")


def _plain(value: Any) -> dict[str, Any]:
    import msgspec

    named: dict[str, Any] = msgspec.structs.asdict(value)
    return named


def _tell_findings(terminal: Terminal, findings: Findings, values: dict[str, Any]) -> None:
    rows = [
        (one.kernels, f"{one.l1_ppb / 1e9:.1e}", f"{one.l2_ppb / 1e9:.1e}", f"{plain.l1_ppb / 1e9:.1e}")
        for one, plain in zip(findings.measured, findings.unmasked, strict=True)
    ]
    terminal.table("largest distance to the others, of an update", ("kernels", ">L1", ">L2", ">L1, no mask"), rows)
    parts = [f"{g.name} (parts {', '.join(map(str, g.at))} of {g.parts})" for g in findings.gauges]
    terminal.table(
        "gauge parameters: trained by noise alone, left out and put back", ("tensor",), [(p,) for p in parts]
    )
    l1, l2 = values["threshold_l1_ppb"] / 1e9, values["threshold_l2_ppb"] / 1e9
    terminal.pairs(
        {
            "threshold": f"{l1:.1e} of an update (L2 {l2:.1e})",
            "other data": f"{findings.other_seed_ppb / 1e9:.1e}",
            "drift": f"{values['drift_ppb'] / 1e9:.2%} of the path in {values['segments']} segments",
        }
    )
