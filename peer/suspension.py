"""Suspended work on disk: the state a worker handed over in the middle of a segment, until the work goes on from it.

Promises: what `keep` has returned for survives a crash, and a half-written one is never found; nothing is kept that
is not a state of its program. A record (its hash, then canonical msgpack) is written after its state and names the
state's root, so a state without a record is rubbish, and the worker that loads a damaged one refuses it.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from peer.work_order import WorkSuspended
from protocol import params
from protocol.codec import Digest, Uint, blake, decode, encode
from protocol.errors import MalformedRecord, RemoteProtocolError
from protocol.merkle import state_root
from protocol.program import Program, state_layout
from protocol.safetensors import parse
from protocol.task import TaskSpec, task_id
from worker.frames import Partial

__all__ = ["KeptState", "SuspendedStates"]


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/suspended/1"):
    """What is known of one state. losses: of the segment's steps so far, None where one is no finite number."""

    task: Digest
    segment: Uint
    step: Uint
    in_root: Digest
    root: Digest
    losses: Annotated[tuple[float | None, ...], msgspec.Meta(max_length=params.SANDBOX_LOSSES_KEPT_MAX)]


@dataclass(frozen=True)
class KeptState:
    """A state that work can go on from: what the worker is told, the losses so far, and the file."""

    partial: Partial
    losses: tuple[float | None, ...]
    state: Path


class SuspendedStates:
    """The states in one folder, one a piece of work, at most SUSPENDED_STATES_MAX of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.suffix == ".part" or not path.with_suffix(".record").exists():
                path.unlink()  # a crash came before the record

    def keep(self, work: bytes, task: TaskSpec, program: Path, suspended: WorkSuspended) -> None:
        """Take over the file `suspended.state`. Reads all of it: call it in a thread.

        Raises RemoteProtocolError, and removes the file, if it is no state of this program; OSError for a full disk.
        """
        try:
            layout = state_layout(Program.from_bytes(program.read_bytes()))
            with suspended.state.open("rb") as file:
                os.fsync(file.fileno())
                # Mapped: the kernel may drop the pages again, and freeing memory is what the pause is for.
                data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            root = state_root(parse(data, layout))
            where = (suspended.segment, suspended.step, suspended.in_root)
            record = encode(_Record(task_id(task), *where, root, suspended.losses))
            self.drop(work)
            os.replace(suspended.state, self._path(work, "safetensors"))
            part = self._path(work, "part")
            with part.open("wb") as file:
                file.write(blake("ichiba/suspended", record) + record)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._path(work, "record"))
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            suspended.state.unlink(missing_ok=True)
        records = sorted(self.folder.glob("*.record"), key=lambda path: path.stat().st_mtime_ns)
        for old in records[: -params.SUSPENDED_STATES_MAX]:
            self.drop(bytes.fromhex(old.stem))

    def find(self, work: bytes, task: TaskSpec, segment: int) -> KeptState | None:
        """The state of `work`, if it stands within `segment` of `task`; one of anything else is removed."""
        try:
            data = self._path(work, "record").read_bytes()
            if blake("ichiba/suspended", data[32:]) != data[:32]:
                raise MalformedRecord("the record of a suspended state is damaged")
            record = decode(_Record, data[32:], bytes_max=params.SUSPENDED_RECORD_BYTES_MAX)
        except FileNotFoundError:
            return None
        except RemoteProtocolError:  # the disk damaged it: the checkpoint before is still there
            self.drop(work)
            return None
        fits = record.task == task_id(task) and record.segment == segment and record.step in task.steps_of(segment)
        state = self._path(work, "safetensors")
        if not fits or not state.exists():
            self.drop(work)
            return None
        return KeptState(Partial(record.step, record.in_root, record.root), record.losses, state)

    def drop(self, work: bytes) -> None:
        """Remove the state of `work`, if there is one."""
        for suffix in ("record", "safetensors"):  # never a record without its state
            self._path(work, suffix).unlink(missing_ok=True)

    def _path(self, work: bytes, suffix: str) -> Path:
        return self.folder / f"{work.hex()}.{suffix}"
