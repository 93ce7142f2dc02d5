"""What a job that trained nothing leaves: metrics, outputs or tokens, out of the `result.*` tensors of its last state.

Imports numpy only when there is something to show. The checkpoint whose root is proved holds the same tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli_output import Terminal, short_id
from protocol import params

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peer.client import Client

__all__ = ["RESULT_PREFIX", "collect_results", "metrics_of", "show_results", "text_of"]

RESULT_PREFIX = "result."
"""Of the tensors in a last state that are results (worker/capture_forward.py); in result.safetensors it is left out."""
_TEXT_ROWS_MAX, _TEXT_CHARS_MAX = 8, 2000  # shown of a generation; all of it is in the file


def metrics_of(results: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """The mean of each metric of an evaluation, by name, the loss first; empty for results of another kind."""
    if "rows" not in results or not int(results["rows"]):
        return {}
    rows = int(results["rows"])
    names = sorted(results.keys() - {"rows"}, key=lambda name: (name != "loss", name))
    return {name: float(results[name].astype("float64").sum()) / rows for name in names}


def text_of(tokens: NDArray[Any]) -> list[str]:
    """Rows of ASCII codes as text, control characters made harmless; empty if they are none. int64 (rows, n)."""
    if tokens.ndim != 2 or not tokens.size or int(tokens.min()) < 0 or int(tokens.max()) > 127:
        return []
    rows = (bytes(row.astype("uint8")).decode("ascii") for row in tokens[:_TEXT_ROWS_MAX])
    return ["".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in row) for row in rows]


def collect_results(terminal: Terminal, tensors: Mapping[str, NDArray[Any]], folder: Path) -> None:
    """Write `result.safetensors` and say what is in it. Nothing for a job that trained."""
    from protocol import safetensors

    whole = {name: array for name, array in tensors.items() if name.startswith(RESULT_PREFIX)}
    results = {name.removeprefix(RESULT_PREFIX): array for name, array in whole.items()}
    if not results:
        return
    (folder / "result.safetensors").write_bytes(safetensors.write(results))
    _say(terminal, results)


def show_results(terminal: Terminal, client: Client, job: dict[str, Any]) -> None:
    """Say what a finished job left that trained nothing, or how to get it from a state too large for a look."""
    if job["state"] != "done" or job.get("kind") not in ("evaluate", "infer", "generate"):
        return
    if job["checkpoint_bytes"] > params.RESULT_SHOWN_BYTES_MAX:
        terminal.say(f"its result: ichiba job get {short_id(job['job'])}")
        return
    from protocol import safetensors

    with tempfile.TemporaryDirectory(prefix="ichiba-show-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        client.get_blob(bytes.fromhex(job["checkpoint"]), checkpoint)
        tensors = safetensors.parse(checkpoint.read_bytes())
    _say(terminal, {n.removeprefix(RESULT_PREFIX): a for n, a in tensors.items() if n.startswith(RESULT_PREFIX)})


def _say(terminal: Terminal, results: Mapping[str, NDArray[Any]]) -> None:
    metrics = metrics_of(results)
    shapes = {name: list(array.shape) for name, array in sorted(results.items())}
    terminal.record("ichiba.outcome/1", {"metrics": metrics, "tensors": shapes})
    for name, value in metrics.items():
        terminal.say(f"{name}: {value:.6g}")
    if not metrics:
        terminal.say("result: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    for row in text_of(results["tokens"]) if "tokens" in results else []:
        terminal.say(row[:_TEXT_CHARS_MAX])
