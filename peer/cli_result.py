"""What a job that trained nothing leaves: metrics, outputs or tokens, out of the `result.*` tensors of its last state.

Imports numpy only when there is something to show. The checkpoint whose root is proved holds the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli_output import Terminal

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RESULT_PREFIX", "collect_results", "metrics_of", "text_of"]

RESULT_PREFIX = "result."
"""Of the tensors in a last state that are results (worker/capture_forward.py); in result.safetensors it is left out."""
_TEXT_ROWS_MAX, _TEXT_CHARS_MAX = 8, 2000  # shown of a generation; all of it is in the file


def metrics_of(results: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """The mean of each metric of an evaluation, by name, the loss first; empty for results of another kind."""
    if "batches" not in results or not float(results["batches"]):
        return {}
    batches = float(results["batches"])
    names = sorted(results.keys() - {"batches"}, key=lambda name: (name != "loss", name))
    return {name: float(results[name]) / batches for name in names}


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
    metrics = metrics_of(results)
    shapes = {name: list(array.shape) for name, array in sorted(results.items())}
    terminal.record("ichiba.outcome/1", {"metrics": metrics, "tensors": shapes})
    for name, value in metrics.items():
        terminal.say(f"{name}: {value:.6g}")
    if not metrics:
        terminal.say("wrote result.safetensors: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    for row in text_of(results["tokens"]) if "tokens" in results else []:
        terminal.say(row[:_TEXT_CHARS_MAX])
