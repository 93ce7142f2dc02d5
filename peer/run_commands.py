"""The verb `submit-run`: a parallel job as a client hands it in, checked before anybody hears of it. Sans-IO."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from peer.control_verbs import SubmitRun
from peer.deals import Job, JobState
from peer.runs import RunDesk
from peer.sealing import Sealing
from protocol import params
from protocol.codec import blake, encode
from protocol.errors import LocalProtocolError
from protocol.stage import Stage
from protocol.task import TaskSpec

__all__ = ["BadArguments", "check_terms", "submit_run"]


class BadArguments(LocalProtocolError):
    """The arguments of a command do not fit."""

    code = "usage"
    exit_code = 2


class Terms(Protocol):
    """What `check_terms` looks at."""

    device: Literal["any", "cpu", "gpu"]
    device_memory_bytes: int
    deadline_ns: int


def check_terms(given: Terms, *, now_ns: int) -> None:
    """Refuse what no solver can meet, before anybody hears of it. Raises BadArguments."""
    if given.device_memory_bytes < 0 or (given.device_memory_bytes and given.device != "gpu"):
        raise BadArguments(
            f"{given.device_memory_bytes} bytes on the card of a device {given.device!r}",
            why="only a graphics card has memory of its own",
            next_step="ask for the device gpu, or for no such memory",
        )
    left_ns = given.deadline_ns - now_ns
    if given.deadline_ns and not 0 < left_ns <= params.DEADLINE_NS_MAX:
        when = f"{-left_ns // 10**9} s ago" if left_ns <= 0 else f"in {left_ns // (86_400 * 10**9)} days"
        raise BadArguments(
            f"the deadline is {when}",
            why=f"it must be ahead, by {params.DEADLINE_NS_MAX // (86_400 * 10**9)} days at most",
            next_step="--deadline 2h, or a time with its zone as in 2027-01-31T18:00+01:00",
        )


def submit_run(runs: RunDesk, sealing: Sealing, arguments: dict[str, Any]) -> Job:
    """Open a run; its blobs are in the store already. Returns its job, whose id is the id of the run: the tasks of the
    units are given it. Raises BadArguments, CannotSeal, InsufficientFunds, LimitExceeded, MalformedRecord."""
    desk = runs.desk
    try:
        given = msgspec.convert(arguments, SubmitRun)
        encoded = [bytes.fromhex(unit.task) for unit in given.units]
    except (msgspec.ValidationError, ValueError) as error:
        raise BadArguments(f"submit-run: {error}") from None
    check_terms(given, now_ns=desk.wall_ns)
    kept = sum(unit.kept for unit in given.units)
    if kept and not desk.means.sandbox:
        raise BadArguments(
            f"{kept} units are to be kept here, and this peer has no sandbox to run them in",
            next_step="see `ichiba doctor`, or take `keep` out of [privacy] in job.toml",
        )
    tasks = _tasks([TaskSpec.from_bytes(one, network=desk.network.id) for one in encoded])
    _check_sizes(given, _stages(tasks)[0])
    run = blake("ichiba/run", desk.me, *encoded, desk.now_ns.to_bytes(8, "big"))
    parent = _job(run, given, tasks[0], JobState.PLACING, desk.wall_ns)
    parent.budget_micro = given.budget_micro
    children = []
    for number, (unit, task, stage) in enumerate(zip(given.units, tasks, _stages(tasks), strict=True)):
        task = msgspec.structs.replace(task, stage=msgspec.structs.replace(stage, run=run))
        child = _job(blake("ichiba/unit", run, number.to_bytes(4, "big")), given, task, JobState.PLACING, desk.wall_ns)
        child.parent, child.unit, child.kept = run, number, unit.kept
        child.checkpoint_bytes, child.memory_bytes = unit.checkpoint_bytes, unit.memory_bytes
        children.append(child)
    sealing.split(children)
    return runs.submit(parent, children, border_bytes=given.border_bytes, shared_bytes=given.shared_bytes)


def _check_sizes(given: SubmitRun, stage: Stage) -> None:
    """Raises BadArguments."""
    for what, found, due in (
        ("borders between stages", given.border_bytes, stage.stages - 1),
        ("stages that share", given.shared_bytes, stage.stages if stage.replicas > 1 else 0),
    ):
        if found and len(found) != due:
            raise BadArguments(f"the bytes of {len(found)} {what}, there are {due}")


def _tasks(tasks: list[TaskSpec]) -> list[TaskSpec]:
    """The tasks, if they are the units of one run in their order, all of one length. Raises BadArguments."""
    stages = _stages(tasks)
    shapes = {(s.stages, s.replicas, s.micro_batches, s.sync, s.run) for s in stages}
    if len(shapes) != 1 or [s.unit for s in stages] != list(range(stages[0].stages * stages[0].replicas)):
        raise BadArguments(
            f"{len(tasks)} tasks that are not all units of one run, each once, in the order of their numbers"
        )
    lengths = {(task.steps, task.steps_per_segment, task.kind, task.name) for task in tasks}
    if len(lengths) != 1:
        raise BadArguments("units of one run with different steps, segments or names")
    return tasks


def _stages(tasks: list[TaskSpec]) -> list[Stage]:
    stages = [task.stage for task in tasks if task.stage is not None]
    if len(stages) != len(tasks):
        raise BadArguments("a task without a stage in a parallel job", next_step="submit it by itself")
    return stages


def _job(job: bytes, given: SubmitRun, task: TaskSpec, state: JobState, now_ns: int) -> Job:
    return Job(
        id=job,
        task=encode(task),
        name=task.name,
        state=state,
        unit_price_max=given.unit_price_max,
        budget_micro=0,
        checkpoint_bytes=sum(unit.checkpoint_bytes for unit in given.units),
        memory_bytes=max(unit.memory_bytes for unit in given.units),
        sandbox=given.sandbox,
        segment=0,
        base_root=task.initial.root,
        base_blob=task.initial.blob,
        created_ns=now_ns,
        device=given.device,
        device_memory_bytes=given.device_memory_bytes,
        deadline_ns=given.deadline_ns,
    )
