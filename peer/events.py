"""What goes into the node and what comes out of it: inputs, effects, and nothing that performs either."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from market.entries import Entry
from protocol.bench_card import Figures, Opening
from protocol.records import BenchChallenge
from protocol.script import AnyTask

__all__ = [
    "BenchEffect",
    "BenchEnded",
    "BenchFilled",
    "BenchInput",
    "BenchMade",
    "BenchWarm",
    "CheckWork",
    "Command",
    "Effect",
    "Emit",
    "Fetch",
    "Fetched",
    "GossipIn",
    "Input",
    "MemoryOpened",
    "MessageIn",
    "OpenMemory",
    "PeerDown",
    "PeerUp",
    "Penalise",
    "Post",
    "Publish",
    "Release",
    "Reply",
    "Save",
    "ScriptSaid",
    "SegmentMade",
    "Send",
    "StartBench",
    "StartWork",
    "StepMade",
    "StopBench",
    "StopWork",
    "Suspend",
    "Tick",
    "WarmBench",
    "WorkChecked",
    "WorkEnded",
]


# --- inputs ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tick:
    """Time passed. The daemon sends one every params.TICK_MS; the simulator whenever it likes."""


@dataclass(frozen=True)
class PeerUp:
    """A connection to `peer` (32-byte key) is ready."""

    peer: bytes
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeerDown:
    """The last connection to `peer` is gone."""

    peer: bytes


@dataclass(frozen=True)
class GossipIn:
    """A gossiped payload; `author` signed it at the transport level, its records are checked by the node."""

    topic: str
    author: bytes
    data: bytes


@dataclass(frozen=True)
class MessageIn:
    """A direct message from a connected peer."""

    peer: bytes
    data: bytes


@dataclass(frozen=True)
class Fetched:
    """The end of a Fetch: `error` is empty when the blob is here and, if asked, its state root is right.

    `forged` says that the bytes are here and are not what was claimed: the claimant lied.
    """

    blob: bytes
    token: bytes
    error: str = ""
    forged: bool = False
    note: str = ""  # how the script ended whose outputs these are; empty if well


@dataclass(frozen=True)
class ScriptSaid:
    """A running script printed `text`, or nothing; it has used `used_ns` of its time."""

    work: bytes
    text: str
    used_ns: int


@dataclass(frozen=True)
class StepMade:
    """One training step done. `loss` is finite."""

    work: bytes
    step: int
    loss: float


@dataclass(frozen=True)
class SegmentMade:
    """One segment done; its checkpoint lies in the blob store as `checkpoint`."""

    work: bytes
    segment: int
    in_root: bytes
    out_root: bytes
    losses: tuple[float, ...]
    operations: int
    checkpoint: bytes
    checkpoint_bytes: int


@dataclass(frozen=True)
class WorkEnded:
    """The worker is gone. `error` is empty after a complete run."""

    work: bytes
    error: str = ""


@dataclass(frozen=True)
class BenchWarm:
    """The bench process runs, and has measured the device. operations_per_second: of exact products."""

    operations_per_second: int
    figures: Figures


@dataclass(frozen=True)
class BenchMade:
    """The chain of `challenge` is multiplied; its result lies in the blob store as `evidence`."""

    challenge: bytes
    evidence: bytes


@dataclass(frozen=True)
class BenchFilled:
    """The memory of `challenge` is filled and held; `root` commits to it."""

    challenge: bytes
    root: bytes


@dataclass(frozen=True)
class MemoryOpened:
    """What OpenMemory asked for."""

    challenge: bytes
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class BenchEnded:
    """The bench process ended by itself, and its memory is gone."""

    error: str


@dataclass(frozen=True)
class WorkChecked:
    """The end of a CheckWork: `error` is empty when the evidence is right; `forged` when it is here and wrong."""

    challenge: bytes
    error: str = ""
    forged: bool = False


@dataclass(frozen=True)
class Command:
    """A person's wish, from the control socket. `token` comes back in the Reply."""

    token: int
    verb: str
    arguments: dict[str, Any] = field(default_factory=dict)


BenchInput: TypeAlias = BenchWarm | BenchMade | BenchFilled | MemoryOpened | BenchEnded | WorkChecked
Input: TypeAlias = (
    Tick
    | PeerUp
    | PeerDown
    | GossipIn
    | MessageIn
    | Fetched
    | ScriptSaid
    | StepMade
    | SegmentMade
    | WorkEnded
    | BenchInput
    | Command
)


# --- effects -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Save:
    """Journal one row. `value` None deletes it. All Saves and Posts of one `handle` commit together, first."""

    table: str
    key: bytes
    value: bytes | None


@dataclass(frozen=True)
class Post:
    """Journal one double entry, already applied to the node's own ledger."""

    entry: Entry


@dataclass(frozen=True)
class Send:
    """A direct message. May be lost: the node repeats what matters."""

    peer: bytes
    data: bytes


@dataclass(frozen=True)
class Publish:
    """Gossip on a topic. May be lost."""

    topic: str
    data: bytes


@dataclass(frozen=True)
class Fetch:
    """Bring a blob here from any of `peers`; with `state_root`, also check that it is a checkpoint of that root
    under `program`, or without a program a script's result of that root."""

    blob: bytes
    token: bytes
    peers: tuple[bytes, ...]
    size_max: int
    state_root: bytes = b""
    program: bytes = b""


@dataclass(frozen=True)
class StartWork:
    """Run segments [first, last) in the sandbox. Answered by StepMade, SegmentMade and one WorkEnded."""

    work: bytes
    task: AnyTask
    base: bytes  # blob id, or empty for the seeded start
    first_segment: int
    last_segment: int
    checkpoint_bytes: int
    memory_bytes: int
    cheat: str = ""


@dataclass(frozen=True)
class StopWork:
    """Kill the worker of `work`, if it runs."""

    work: bytes


@dataclass(frozen=True)
class Suspend:
    """End every worker at its next step boundary, keep its state on disk, and empty the pool. No WorkEnded follows:
    a later StartWork of the same work goes on from that state. After `within_ms` a worker is killed without."""

    within_ms: int


@dataclass(frozen=True)
class WarmBench:
    """Start the bench process. Answered by BenchWarm, or BenchEnded."""


@dataclass(frozen=True)
class StartBench:
    """Multiply the chain of a challenge, then fill its memory. Answered by BenchMade and BenchFilled, or BenchEnded."""

    id: bytes
    challenge: BenchChallenge


@dataclass(frozen=True)
class OpenMemory:
    """Open blocks of the memory of the bench. Answered by MemoryOpened."""

    id: bytes
    indices: tuple[int, ...]


@dataclass(frozen=True)
class StopBench:
    """End the bench process and free its memory, if it runs."""


@dataclass(frozen=True)
class CheckWork:
    """Fetch the evidence of a challenge from its peer and check it (protocol.bench_card). Answered by WorkChecked."""

    id: bytes
    challenge: BenchChallenge
    evidence: bytes


@dataclass(frozen=True)
class Release:
    """The blobs fetched or made for `owner` (a deal, a case, a piece of work) may be evicted, but for `keep`."""

    owner: bytes
    keep: bytes = b""


@dataclass(frozen=True)
class Emit:
    """Something a person may want to see; kept in the job's log. `job` may be empty."""

    kind: str
    job: bytes
    data: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The answer to a Command. `error` (IchibaError.as_dict plus exit_code) is None on success."""

    token: int
    result: dict[str, Any]
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Penalise:
    """`peer` broke the protocol: lower its score."""

    peer: bytes
    reason: str


BenchEffect: TypeAlias = WarmBench | StartBench | OpenMemory | StopBench | CheckWork
Effect: TypeAlias = (
    Save
    | Post
    | Send
    | Publish
    | Fetch
    | StartWork
    | StopWork
    | Suspend
    | BenchEffect
    | Release
    | Emit
    | Reply
    | Penalise
)
