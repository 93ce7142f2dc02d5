"""Script jobs: a command with files, run for at most so long, and what it leaves behind. DESIGN §4, last bullet.

A script is code, not data: nothing of it can be counted, judged or re-executed bit for bit. So it runs only where a
sandbox contains it, it is charged by time, and its receipt proves who ran what for how long and with which outputs,
not that the outputs are right. One operation of its records is one nanosecond, so a giga-operation is a second, and
prices, caps, vouchers and the ledger mean what they always mean. Pure: it runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, blake, decode, encode
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed, WrongNetwork
from protocol.profile_task import ProfileSpec
from protocol.task import TaskSpec

__all__ = [
    "ASSURANCE",
    "ASSURANCES",
    "AnyTask",
    "Ended",
    "FileRef",
    "OutputFile",
    "Replicas",
    "ScriptResult",
    "ScriptSpec",
    "blobs_of",
    "check_path",
    "compare",
    "content_of",
    "parts_of",
    "read_task",
    "result_from",
    "result_trailer",
    "words_for",
]

ASSURANCE = "script: output hash only, not re-executed"
ASSURANCES = {"script": ASSURANCE, "profile": "profile: signed by its verifier, not re-executed"}
"""What is known of work that nobody re-executes, by the mode of its task."""

NS_PER_SECOND = 10**9
_TRAILER_BYTES = 8

Word = Annotated[str, msgspec.Meta(max_length=params.SCRIPT_WORD_CHARS_MAX)]
PathName = Annotated[str, msgspec.Meta(min_length=1, max_length=params.SCRIPT_PATH_CHARS_MAX)]
Ended: TypeAlias = Literal["exited", "deadline", "memory", "log-flood", "lost"]


def check_path(name: str) -> None:
    """Raise MalformedRecord unless `name` is a relative path that means the same file wherever it is put.

    Folders are separated by "/". A part is printable, begins with a letter, digit or "_", and holds no backslash or
    colon: no traversal, no hidden file, no option of a command, no drive.
    """
    parts = name.split("/")
    if len(name) > params.SCRIPT_PATH_CHARS_MAX or len(parts) > params.SCRIPT_PATH_DEPTH_MAX:
        raise MalformedRecord(f"path {name[:60]!r} is longer or deeper than a script's file may be")
    for part in parts:
        if not part or not (part[0].isalnum() or part[0] == "_") or not part.isprintable() or set(part) & set("\\:"):
            raise MalformedRecord(
                f"{name[:60]!r} is no name for a script's file",
                why="each part begins with a letter, a digit or _, and holds no backslash or colon",
            )


class FileRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One input: the blob that a script finds as /inputs/`name`."""

    name: PathName
    blob: Digest
    size_bytes: Uint


class ScriptSpec(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/script/1", kw_only=True
):
    """A whole script job.

    command: its words; the first is looked for in PATH, and `python3` is the worker's own Python. seconds: it is
    ended after so much time and never charged more. memory_bytes: of all its processes, their files in /scratch
    and /outputs included. outputs_bytes: what /outputs may hold. seed: given to it, for it to use or not.
    """

    network: Digest
    command: Annotated[tuple[Word, ...], msgspec.Meta(min_length=1, max_length=params.SCRIPT_WORDS_MAX)]
    files: Annotated[tuple[FileRef, ...], msgspec.Meta(max_length=params.SCRIPT_INPUTS_MAX)]
    seconds: Annotated[int, msgspec.Meta(ge=1, le=params.SCRIPT_SECONDS_MAX)]
    memory_bytes: Annotated[int, msgspec.Meta(ge=params.SCRIPT_MEMORY_BYTES_MIN, le=2**44)]
    outputs_bytes: Annotated[int, msgspec.Meta(ge=0, le=params.SCRIPT_OUTPUT_BYTES_MAX)]
    seed: Uint
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

    # What a deal asks of any task: a script is one step in one segment, and its operations are nanoseconds.
    segments: ClassVar[int] = 1
    steps: ClassVar[int] = 1
    steps_per_segment: ClassVar[int] = 1
    mode: ClassVar[Literal["script"]] = "script"

    @property
    def operations_per_step(self) -> int:
        """The most nanoseconds it is charged."""
        return self.seconds * NS_PER_SECOND

    @property
    def program(self) -> bytes:
        """What stands in records for the program: the hash of the command and its files."""
        return blake("ichiba/script-program", encode((self.command, self.files)))

    def steps_of(self, segment: int) -> range:
        """The steps of the one segment."""
        if segment != 0:
            raise MalformedRecord(f"segment {segment} of a script, which is one segment")
        return range(1)

    @classmethod
    def from_bytes(cls, data: bytes, *, network: bytes) -> ScriptSpec:
        """Decode and check what a decoder cannot express. Raises RemoteProtocolError."""
        script = decode(cls, data, bytes_max=params.SCRIPT_SPEC_BYTES_MAX)
        if script.network != network:
            raise WrongNetwork(f"script of network {script.network.hex()[:12]}, this is {network.hex()[:12]}")
        if not script.command[0] or any("\0" in word for word in script.command):
            raise MalformedRecord("the command of a script is empty or holds a NUL")
        names = [file.name for file in script.files]
        for name in names:
            check_path(name)
        if names != sorted(set(names)):
            raise MalformedRecord("the inputs of a script are not in strict order of their names")
        folders = {"/".join(name.split("/")[:end]) for name in names for end in range(1, name.count("/") + 1)}
        if folders & set(names):
            raise MalformedRecord("an input of a script is a file and a folder at once")
        if sum(file.size_bytes for file in script.files) > params.SCRIPT_INPUT_BYTES_MAX:
            raise LimitExceeded(f"the inputs of a script are more than {params.SCRIPT_INPUT_BYTES_MAX} bytes")
        if script.outputs_bytes > script.memory_bytes:
            raise MalformedRecord(
                f"outputs of {script.outputs_bytes} bytes in a memory of {script.memory_bytes}",
                why="outputs lie in the script's memory until it has ended",
            )
        return script


AnyTask: TypeAlias = TaskSpec | ScriptSpec | ProfileSpec


def read_task(data: bytes, *, network: bytes) -> AnyTask:
    """A task of any kind from hostile bytes. Raises RemoteProtocolError."""
    for kind in (ScriptSpec, ProfileSpec):
        tag = msgspec.msgpack.encode(kind.__struct_config__.tag)
        if data[1 : 1 + len(tag)] == tag:
            return kind.from_bytes(data, network=network)
    return TaskSpec.from_bytes(data, network=network)


def blobs_of(task: AnyTask) -> dict[bytes, int]:
    """The blobs a solver needs before it can start, beside the state it starts from: id -> bytes."""
    if isinstance(task, ScriptSpec):
        return {file.blob: file.size_bytes for file in task.files}
    if isinstance(task, ProfileSpec):
        return blobs_of(task.of)
    # A unit of a parallel job that reads no data knows its arrays by their shapes alone.
    arrays = (array for array in task.arrays if task.stage is None or array.blob != bytes(32))
    return {task.program: task.program_bytes} | {array.blob: array.size_bytes for array in arrays}


def content_of(task: AnyTask) -> set[bytes]:
    """Every blob that a task names: program or files, data, and the state it starts from."""
    base = {task.initial.blob} if isinstance(task, TaskSpec) and task.initial.kind == "state" else set()
    return {*blobs_of(task), *base}


# --- what it leaves ------------------------------------------------------------------------------------------
class OutputFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One regular file a script left in /outputs. `digest` is what `b2sum -l 256` prints."""

    name: PathName
    size_bytes: Uint
    digest: Digest


class ScriptResult(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/script-result/1", kw_only=True
):
    """How a script ended and what it left.

    ended: "exited" (by itself: `status` is its exit status, 128 + n after signal n), "deadline" (its time was over),
    "memory" (the kernel ended something of it at its limit), "log-flood" (it printed too much), or "lost" (it took
    its supervisor down; no outputs). log_bytes: of the end of what it printed, which follows the outputs.
    """

    ended: Ended
    status: Annotated[int, msgspec.Meta(ge=0, le=255)]
    files: Annotated[tuple[OutputFile, ...], msgspec.Meta(max_length=params.SCRIPT_OUTPUTS_MAX)]
    log_bytes: Annotated[int, msgspec.Meta(ge=0, le=params.SANDBOX_LOG_KEPT_BYTES)]

    @property
    def root(self) -> bytes:
        """What two runs are compared by, and a receipt names: the end and every output, but not the log."""
        return blake("ichiba/script-outputs", encode((self.ended, self.status, self.files)))

    @property
    def outputs_bytes(self) -> int:
        """All outputs together."""
        return sum(file.size_bytes for file in self.files)


def words_for(result: ScriptResult) -> str:
    """How it ended, in words; empty after exit status 0."""
    match result.ended:
        case "exited":
            return f"the script ended with exit status {result.status}" if result.status else ""
        case "deadline":
            return "the script was ended when its time was over; raise `seconds` in job.toml"
        case "memory":
            return "the script ran out of memory; raise `memory` in job.toml"
        case "log-flood":
            return f"the script printed more than {params.SANDBOX_LOG_BYTES_MAX} bytes and was ended"
        case "lost":
            return "the script took its supervisor down, so its outputs are lost"


def result_trailer(result: ScriptResult) -> bytes:
    """What follows outputs and log in the one blob of a result: the list, then its length (u64, little-endian)."""
    listed = encode(result)
    return listed + len(listed).to_bytes(_TRAILER_BYTES, "little")


def result_from(data: bytes | memoryview, *, outputs_bytes_max: int = params.SCRIPT_OUTPUT_BYTES_MAX) -> ScriptResult:
    """The result in a blob from hostile bytes, every output's hash checked.

    Layout: the outputs one after the other, the kept log, the list, its length. Raises RemoteProtocolError.
    """
    view = memoryview(data)
    size = int.from_bytes(view[-_TRAILER_BYTES:], "little") if len(view) > _TRAILER_BYTES else 0
    if not 0 < size <= min(params.SCRIPT_RESULT_BYTES_MAX, len(view) - _TRAILER_BYTES):
        raise MalformedRecord("no list of outputs at the end of a script's result")
    body = len(view) - _TRAILER_BYTES - size
    listed = bytes(view[body : body + size])
    result = decode(ScriptResult, listed, bytes_max=params.SCRIPT_RESULT_BYTES_MAX)
    if result.outputs_bytes > outputs_bytes_max:
        raise LimitExceeded(f"outputs of {result.outputs_bytes} bytes, at most {outputs_bytes_max} were ordered")
    if result.outputs_bytes + result.log_bytes != body:
        raise MalformedRecord(f"outputs and log of {result.outputs_bytes + result.log_bytes} bytes in {body}")
    names = [file.name for file in result.files]
    for name in names:
        check_path(name)
    if len(set(names)) != len(names):
        raise MalformedRecord("two outputs of one name")
    for file, part in parts_of(result, view):
        if hashlib.blake2b(part, digest_size=32).digest() != file.digest:
            raise VerificationFailed(f"output {file.name} does not have the hash that is listed")
    return result


def parts_of(result: ScriptResult, view: memoryview) -> Iterable[tuple[OutputFile, memoryview]]:
    """Each output of a checked result with its bytes in the blob."""
    start = 0
    for file in result.files:
        yield file, view[start : start + file.size_bytes]
        start += file.size_bytes


# --- several runs of one script ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Replicas:
    """What the ended runs of one script say together. `same`: None while fewer than two have ended."""

    ended: int
    count: int
    same: bool | None


def compare(roots: Sequence[bytes | None]) -> Replicas:
    """Compare output roots; None stands for a run that has not ended with outputs."""
    known = [root for root in roots if root is not None]
    return Replicas(len(known), len(roots), len(set(known)) == 1 if len(known) > 1 else None)
