"""Which elements of its data a step reads: a function of the task and the step, and of nothing else. DESIGN §4.

The worker cuts whole batches by it; a referee asks for the one element a dispute ends at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import philox
from protocol.errors import MalformedRecord
from protocol.program import BATCH_STREAM, Input, Program
from protocol.reference_random import integer
from protocol.stage import IN_PREFIX
from protocol.task import PRESENT, ArrayRef, TaskSpec

__all__ = ["batch_inputs", "batch_of", "check_batches", "examples_of", "present_of", "rows_of", "source_of"]


def batch_inputs(task: TaskSpec, program: Program) -> list[Input]:
    """The inputs that come from the arrays. A unit receives others, of the same role, from its neighbours."""
    inputs = program.inputs_of("batch")
    return [item for item in inputs if task.stage is None or not item.name.startswith(IN_PREFIX)]


def check_batches(task: TaskSpec, program: Program) -> None:
    """Refuse a task whose batches are not what the program takes. Raises MalformedRecord."""
    inputs = batch_inputs(task, program)
    for item in inputs:
        _check(task, item)
    rule, rows = task.batch, _rows(task)
    if rule.rule == "sequence" and rows % rule.size and all(item.name != PRESENT for item in inputs):
        raise MalformedRecord(
            f"the last batch has {rows % rule.size} of {rule.size} rows, and the program cannot leave the rest out",
            why="a mean over a batch says nothing of its rows",
            next_step='give one value a row, as with reduction="none", or a size that divides the rows',
        )


def _check(task: TaskSpec, item: Input) -> None:
    rule, arrays = task.batch, {ref.name: ref for ref in task.arrays}
    if item.name == PRESENT and rule.rule == "sequence":
        if (item.dtype, item.shape) != ("bool", (rule.size,)):
            raise MalformedRecord(
                f"input {PRESENT} is {item.dtype} {item.shape}, the batch rule gives bool ({rule.size},)",
                next_step="make the example batch of build() as large as the batch in job.toml",
            )
        return
    if rule.windows:
        if item.name not in ("x", "y"):
            raise MalformedRecord(f"the batch rule `{rule.rule}` has no input {item.name}, only x and y of a text")
        (array,) = task.arrays
        shape: tuple[int, ...] = (rule.size, rule.length)
    else:
        if item.name not in arrays:
            raise MalformedRecord(
                f"input {item.name} has no array", next_step="name arrays after the example batch: x, y"
            )
        array = arrays[item.name]
        shape = (rule.size, *array.shape[1:])
    if item.shape != shape:
        raise MalformedRecord(
            f"input {item.name} has shape {item.shape}, the batch rule gives {shape}",
            next_step="make the example batch of build() as large as the batch in job.toml",
        )
    if array not in task.fetched:
        raise MalformedRecord(f"input {item.name} reads an array that the unit is not given")
    if not _fits(array.dtype, item.dtype):
        raise MalformedRecord(f"input {item.name} is {item.dtype}, its array is {array.dtype}")


def _fits(stored: str, wanted: str) -> bool:
    if stored == wanted or wanted == "float32":
        return True
    return wanted == "int64" and stored in ("uint8", "int32")


def _rows(task: TaskSpec) -> int:
    return task.batch.rows_of(task.arrays[0].shape[0])


def examples_of(task: TaskSpec) -> int:
    """What the row numbers, or window starts, of a task are below."""
    elements = task.arrays[0].shape[0]
    return elements - task.batch.length if task.batch.rule == "windows" else elements


# --- the whole batch ---------------------------------------------------------------------------------------
def batch_of(
    task: TaskSpec, program: Program, arrays: Mapping[str, NDArray[Any]], step: int, *, seed: int | None = None
) -> dict[str, NDArray[Any]]:
    """The batch inputs of `step`, a step of the task, by name, as the program takes them.

    arrays: the task's, by name; of a unit, those that it reads. seed: the task's, unless a demonstration of fraud says
    otherwise.
    """
    rule, inputs = task.batch, batch_inputs(task, program)
    if not inputs:
        return {}
    present = present_of(task, step)
    if rule.rule == "whole":
        cut = dict(arrays)
    else:
        rows = rows_of(task, step, seed=seed)
        if rule.windows:
            (text,) = arrays.values()
            starts = rows * rule.length if rule.rule == "sequence" else rows
            places = starts[:, None] + np.arange(rule.length)
            cut = {"x": text[places], "y": text[places + 1]}
        else:
            cut = {name: array[rows] for name, array in arrays.items()}
    cut[PRESENT] = present
    return {item.name: np.ascontiguousarray(cut[item.name].astype(item.dtype)) for item in inputs}


def rows_of(task: TaskSpec, step: int, *, seed: int | None = None) -> NDArray[np.int64]:
    """The row numbers, or window starts, of the batch of `step`: int64 (size,), by any rule but `whole`.

    seed: the task's, unless a demonstration of fraud says otherwise.
    """
    rule = task.batch
    if rule.rule == "sequence":
        return np.where(present_of(task, step), np.arange(step * rule.size, (step + 1) * rule.size), 0)
    drawn_with = task.seed if seed is None else seed
    return philox.integers(drawn_with, step, BATCH_STREAM, rule.size, examples_of(task))


def present_of(task: TaskSpec, step: int) -> NDArray[np.bool_]:
    """Which rows of the batch of `step` are real: bool (size,). Only the rule `sequence` fills a batch up."""
    size = task.batch.size
    if task.batch.rule != "sequence":
        return np.ones(size, dtype=np.bool_)
    return np.arange(step * size, (step + 1) * size) < _rows(task)


# --- one element -------------------------------------------------------------------------------------------
def source_of(task: TaskSpec, item: Input, step: int, element: int) -> tuple[ArrayRef, int]:
    """The array, and its row-major element, that element `element` of the batch input `item` is at `step`.

    item: any but PRESENT, which comes from no array.
    """
    rule = task.batch
    if rule.windows:
        row, column = divmod(element, rule.length)
        start = _row(task, step, row) * (rule.length if rule.rule == "sequence" else 1)
        return task.arrays[0], start + column + (item.name == "y")
    (array,) = (ref for ref in task.arrays if ref.name == item.name)
    width = math.prod(array.shape[1:])
    row, column = divmod(element, width)
    return array, _row(task, step, row) * width + column


def _row(task: TaskSpec, step: int, place: int) -> int:
    if task.batch.rule == "whole":
        return place
    if task.batch.rule == "sequence":
        row = step * task.batch.size + place
        return row if row < _rows(task) else 0
    return integer(task.seed, step, BATCH_STREAM, place, examples_of(task))
