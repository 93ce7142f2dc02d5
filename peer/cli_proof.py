"""`ichiba job proof`: the chain of jobs that a result stands on, from the newest back to a seed, checked offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, common, short_id

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from protocol.program import Input

__all__ = ["proof"]


def _drawn(item: Input, seed: int, number: int) -> NDArray[Any]:
    """A weight that only the later job has, as its solver drew it. Loads torch."""
    from worker.training import drawn

    found: NDArray[Any] = drawn(item, seed, number).numpy()
    return found


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@common
def proof(terminal: Terminal, results: tuple[Path, ...]) -> None:
    """Check that each result was built on the next, back to the first.

    RESULTS are folders that `ichiba job get` wrote, the newest first. Each is checked as `receipts verify` does; then,
    that its job started from the very weights the next one's job ended in. Asks nobody.

    \b
    ichiba job proof tuned trained
    """
    from peer.cli_money import check_proof
    from peer.home import Home
    from protocol.errors import NotFound
    from protocol.stack import verify_stack

    network = Home(terminal.data_dir).network()
    reports = [check_proof(folder / "proof.json", network.id)[0] for folder in results]
    for number, (folder, report) in enumerate(zip(results, reports, strict=True)):
        solvers, name = len({deal.solver for deal in report.deals if deal.counted}), short_id(report.job.hex())
        line = (
            f"{name} ({report.name}): state {report.base_root.hex()[:12]} to {report.final_root.hex()[:12]}, "
            f"{report.segments_done} of {report.segments} segments by {solvers} solver(s), "
            f"{report.checked_permille / 10:.1f} % re-executed"
        )
        taken = None
        if number + 1 < len(reports):
            program = folder / "model.program"
            if not program.is_file():
                raise NotFound(f"no model.program in {folder}", next_step=f"ichiba job get {name} -o {folder}")
            taken = verify_stack(report, program.read_bytes(), reports[number + 1], _drawn)
        open_questions = report.not_proved(origin_known=taken is not None)
        start = f"seed {report.seed}" if report.seeded else "weights whose origin is not proved here"
        if taken is not None:
            start = f"{taken} tensors of the job below, bit for bit"
        terminal.record(
            "ichiba.link/1",
            {
                "job": report.job.hex(), "name": report.name, "base_root": report.base_root.hex(),
                "final_root": report.final_root.hex(), "segments": report.segments, "solvers": solvers,
                "segments_checked": list(report.segments_checked), "checked_permille": report.checked_permille,
                "tensors_taken": taken, "seeded": report.seeded, "not_proved": open_questions,
            },
        )  # fmt: skip
        terminal.say(line)
        terminal.say(f"  starts from {start}")
        for sentence in open_questions:
            terminal.say(f"  not proved  {sentence}")
