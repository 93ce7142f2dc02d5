"""What goes into the node and what comes out of it: inputs, effects, and nothing that performs either."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from market.entries import Entry
from market.placing import ChooseUnits, PlaceUnits, UnitsChosen, UnitsPlaced
from market.rounds import Played, Round
from peer.run_events import LinkEnds, Relink, RunOrder, Settled, UnitWaits
from protocol.bench_card import Figures, Opening
from protocol.link_report import LinkTimed
from protocol.profile import Findings, Gauge
from protocol.records import BenchChallenge
from protocol.script import AnyTask
from protocol.sealing import Keys
from protocol.task import TaskSpec

__all__ = [
    "BenchEffect",
    "BenchEnded",
    "BenchFilled",
    "BenchInput",
    "BenchMade",
    "BenchWarm",
    "BlobRead",
    "CheckWork",
    "Command",
    "Effect",
    "Emit",
    "Fetch",
    "Fetched",
    "GossipIn",
    "Input",
    "Inspect",
    "Inspected",
    "MemoryOpened",
    "MessageIn",
    "OpenMemory",
    "PeerDown",
    "PeerUp",
    "Penalise",
    "Post",
    "ProfileMade",
    "Publish",
    "ReadBlob",
    "Release",
    "Relink",
    "Reply",
    "Save",
    "ScriptSaid",
    "SegmentMade",
    "Send",
    "Settled",
    "StartBench",
    "StartWork",
    "StepMade",
    "StopBench",
    "StopWork",
    "Suspend",
    "Tick",
    "UnitWaits",
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
    peer: bytes = b""  # whose link it measured, with the bytes per second; 0: it tells nothing
    bytes_per_second: int = 0
    ends: LinkEnds | None = None  # of a unit's checkpoint, if they were asked for


@dataclass(frozen=True)
class BlobRead:
    """The end of a ReadBlob: the bytes, or an `error`."""

    blob: bytes
    token: bytes
    data: bytes = b""
    error: str = ""


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
    """One segment done; its checkpoint lies in the blob store as `checkpoint`, and its false end, where one was
    ordered, as `false_checkpoint`."""

    work: bytes
    segment: int
    in_root: bytes
    out_root: bytes
    losses: tuple[float, ...]
    operations: int
    checkpoint: bytes
    checkpoint_bytes: int
    false_root: bytes = b""
    false_checkpoint: bytes = b""
    false_bytes: int = 0
    distance: tuple[int, int] | None = None  # of what was to be compared with this end, in ppb: L1 and L2
    ends: LinkEnds | None = None  # of a unit of a parallel job


@dataclass(frozen=True)
class ProfileMade:
    """A profile is done. operations_per_second: of the first configuration."""

    work: bytes
    findings: Findings
    operations_per_second: int


@dataclass(frozen=True)
class WorkEnded:
    """The worker is gone. `error` is empty after a complete run. blames: the neighbour whose payload it could not
    decode, by the number of its unit; else -1."""

    work: bytes
    error: str = ""
    blames: int = -1


@dataclass(frozen=True)
class Inspected:
    """The answer to an Inspect: `body` is what a player signs, `opening` what proves itself, `state` the blob of the
    state before the inspected step where the question asked for one. With an `error` all three are empty."""

    work: bytes
    question: bytes
    body: bytes = b""
    opening: bytes = b""
    state: bytes = b""
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
    | BlobRead
    | ScriptSaid
    | LinkTimed
    | StepMade
    | SegmentMade
    | ProfileMade
    | WorkEnded
    | Inspected
    | Played | UnitsPlaced | UnitsChosen
    | BenchInput
    | UnitWaits
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
    keys: Keys | None = None  # of a sealed job: it comes sealed, and is served to nobody as it is
    links: bool = False  # of a unit's checkpoint: tell its LinkEnds


@dataclass(frozen=True)
class Protect:
    """Blobs that are here: from now on serve them only sealed, to who has their keys; with NO_KEYS to nobody."""

    blobs: tuple[bytes, ...]
    keys: Keys


@dataclass(frozen=True)
class ReadBlob:
    """Give the node the bytes of a blob that is here: a Program, which it must know to follow a dispute."""

    blob: bytes
    token: bytes
    size_max: int


@dataclass(frozen=True)
class StartWork:
    """Run segments [first, last) in the sandbox. Answered by StepMade, SegmentMade (ProfileMade for a profile), and one
    WorkEnded.

    ordered: a segment to make a false end of beside the true one, and the fraud it is to look like; None for none.
    gauges: parts of the state that every segment of a tolerant task ends with as it began. compare: the blob of a
    solver's end of the one segment, whose distance from the end made here is wanted; empty for none.
    """

    work: bytes
    task: AnyTask
    base: bytes  # blob id, or empty for the seeded start
    first_segment: int
    last_segment: int
    checkpoint_bytes: int
    memory_bytes: int
    cheat: str = ""
    ordered: tuple[int, str] | None = None
    gauges: tuple[Gauge, ...] = ()
    compare: bytes = b""
    keys: Keys | None = None  # of a sealed job: what is made here is protected too; NO_KEYS: it is for nobody else
    run: RunOrder | None = None  # of a unit that trains with its neighbours
    tapes: tuple[bytes, ...] = ()  # of a unit that is checked: blobs of what it received, for each segment


@dataclass(frozen=True)
class Inspect:
    """Answer one question of a dispute (protocol/dispute_player.py) in the sandbox; answered by one Inspected.

    base: the blob of the state that the question counts from: the segment's start, or what an earlier answer gave as
    `state`; empty for the seeded start. claimed: the blob of an end state to defend against the facts, for tests and
    demonstrations of fraud; empty for an honest answer.
    """

    work: bytes
    task: TaskSpec
    base: bytes
    question: bytes
    memory_bytes: int
    claimed: bytes = b""
    keys: Keys | None = None  # as in StartWork


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
    | Protect
    | ReadBlob
    | StartWork
    | StopWork
    | Inspect
    | Round | PlaceUnits | ChooseUnits
    | Relink
    | Settled
    | Suspend
    | BenchEffect
    | Release
    | Emit
    | Reply
    | Penalise
)
