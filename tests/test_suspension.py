"""What a worker may say of a suspended segment, and what is kept of it on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from peer.suspension import SuspendedStates
from peer.workshop import WorkSuspended
from protocol import params
from protocol.errors import MalformedRecord
from protocol.task import TaskSpec
from tests.test_pause import WORK, stop_before
from tests.test_training import gpt_task
from worker import checkpoint
from worker.conversation import Conversation
from worker.frames import BadReply, Done, Segment, Step, Suspended, frame


# --- what a worker may say ---------------------------------------------------------------------------------
def talking(**fields: Any) -> Conversation:
    """About segments 2 and 3 of four steps each, the daemon having asked for a suspension."""
    given: dict[str, Any] = {"suspending": True, "checkpoint_bytes_max": 10, **fields}
    return Conversation("train", 2, (range(8, 12), range(12, 16)), **given)


def handing(step: int, **fields: Any) -> bytes:
    given: dict[str, Any] = {"segment": 2, "step": step, "in_root": bytes(32), "checkpoint_bytes": 10, **fields}
    return frame(Suspended(**given)) + bytes(given["checkpoint_bytes"])


def steps(first: int, last: int) -> bytes:
    return b"".join(frame(Step(step, float(step))) for step in range(first, last))


SEGMENT = frame(
    Segment(
        segment=2, first_step=8, last_step=12, in_root=bytes(32), out_root=bytes(32), operations=1, checkpoint_bytes=1,
        diverged_step=None,
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("said", "losses"),
    [
        (handing(8), []),
        (steps(8, 10) + handing(10), [8.0, 9.0]),
        (steps(8, 12) + SEGMENT + b"x" + handing(12, segment=3), []),
        (steps(8, 12) + SEGMENT + b"x" + steps(12, 13) + handing(13, segment=3), [12.0]),
    ],
)
def test_a_worker_that_was_asked_hands_over_where_it_stands(said: bytes, losses: list[float]) -> None:
    talk = talking()
    list(talk.take(said + frame(Done())))
    assert talk.finished
    assert talk.suspended
    assert list(talk.losses) == losses


@pytest.mark.parametrize(
    ("said", "code", "asked"),
    [
        (steps(8, 10) + handing(10), "wrong-reply", False),
        (handing(9), "wrong-reply", True),
        (steps(8, 10) + handing(9), "wrong-reply", True),
        (steps(8, 10) + handing(10, segment=3), "wrong-reply", True),
        (steps(8, 12) + handing(12), "wrong-reply", True),
        (handing(8, checkpoint_bytes=11), "oversize-checkpoint", True),
        (handing(8) + steps(8, 9), "wrong-reply", True),
        (handing(8) + handing(8), "wrong-reply", True),
        (handing(8) + frame(Done()) + b"x", "extra-bytes", True),
    ],
)
def test_each_lie_about_a_suspension_has_its_code(said: bytes, code: str, asked: bool) -> None:
    with pytest.raises(BadReply) as refused:
        list(talking(suspending=asked).take(said))
    assert refused.value.code == code


def test_a_resumed_segment_begins_where_it_stood() -> None:
    talk = talking()
    talk.resume(10, (8.0, None))
    list(talk.take(steps(10, 12) + SEGMENT + b"x"))
    assert list(talk.losses) == [8.0, None, 10.0, 11.0]
    talk = talking()
    talk.resume(10, (8.0, 9.0))
    with pytest.raises(BadReply, match="was due"):
        list(talk.take(steps(8, 9)))


# --- what is kept on the disk ------------------------------------------------------------------------------
def handed_over(folder: Path, **fields: Any) -> tuple[SuspendedStates, TaskSpec, Path, WorkSuspended]:
    """A store, and a real state that a worker has just handed over."""
    task, program, arrays = gpt_task()
    stopped, losses = stop_before(task, program, arrays, 6)
    (folder / "program").write_bytes(program.to_bytes())
    (folder / "handed").write_bytes(fields.pop("data", stopped.state))
    given = {
        "segment": 1, "step": 6, "in_root": stopped.in_root, "losses": tuple(losses), "state": folder / "handed",
        "state_bytes": len(stopped.state), **fields,
    }  # fmt: skip
    return SuspendedStates(folder / "kept"), task, folder / "program", WorkSuspended(**given)


def test_a_kept_state_is_found_again_for_its_segment_and_only_for_it(tmp_path: Path) -> None:
    states, task, program, suspended = handed_over(tmp_path)
    states.keep(WORK, task, program, suspended)
    assert not suspended.state.exists()
    again = SuspendedStates(tmp_path / "kept")
    found = again.find(WORK, task, 1)
    assert found is not None
    assert (found.partial.step, found.partial.in_root, found.losses) == (6, suspended.in_root, suspended.losses)
    loaded = checkpoint.load(found.state.read_bytes())
    assert checkpoint.state_root(loaded) == found.partial.root
    assert again.find(b"o" * 32, task, 1) is None
    assert again.find(WORK, msgspec.structs.replace(task, seed=12), 1) is None
    assert list((tmp_path / "kept").iterdir()) == [], "what fits nothing is removed"


@pytest.mark.parametrize("segment", [0, 2])
def test_a_state_of_another_segment_is_removed(tmp_path: Path, segment: int) -> None:
    states, task, program, suspended = handed_over(tmp_path)
    states.keep(WORK, task, program, suspended)
    assert states.find(WORK, task, segment) is None
    assert states.find(WORK, task, 1) is None


def test_bytes_that_are_no_state_of_the_program_are_not_kept(tmp_path: Path) -> None:
    hostile = checkpoint.dump({"w": torch.zeros(3)})
    states, task, program, suspended = handed_over(tmp_path, data=hostile)
    with pytest.raises(MalformedRecord, match="lacks"):
        states.keep(WORK, task, program, suspended)
    assert not suspended.state.exists()
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_a_crash_left_half_written_or_the_disk_damaged_is_not_found(tmp_path: Path) -> None:
    states, task, program, suspended = handed_over(tmp_path)
    states.keep(WORK, task, program, suspended)
    record = tmp_path / "kept" / f"{WORK.hex()}.record"
    whole_record = record.read_bytes()
    record.rename(record.with_suffix(".part"))  # died before the record had its name
    assert SuspendedStates(tmp_path / "kept").find(WORK, task, 1) is None
    assert list((tmp_path / "kept").iterdir()) == []
    record.write_bytes(whole_record[:-1] + b"\xc1")
    record.with_suffix(".safetensors").write_bytes(b"")
    assert states.find(WORK, task, 1) is None
    assert not record.exists()


def test_only_so_many_states_are_kept(tmp_path: Path) -> None:
    states, task, program, suspended = handed_over(tmp_path)
    state = suspended.state.read_bytes()
    for number in range(params.SUSPENDED_STATES_MAX + 1):
        suspended.state.write_bytes(state)
        states.keep(bytes([number] * 32), task, program, suspended)
        os.utime(tmp_path / "kept" / f"{bytes([number] * 32).hex()}.record", ns=(number, number))
    assert states.find(bytes(32), task, 1) is None
    assert states.find(b"\x01" * 32, task, 1) is not None
