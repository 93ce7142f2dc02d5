"""Many peers on one event heap: the same Node the daemon runs, under drawn loss, delay, duplication and crashes.

One seed draws everything, so a failure replays from its seed. Nothing here waits: an hour of a swarm takes as long
as its events take to handle. After every event the invariants hold or `InvariantBroken` names the seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from market.entries import Entry
from market.ledger import Ledger
from market.placing import ChooseUnits, PlaceUnits
from market.rounds import Round
from peer.desk import Means
from peer.events import (
    BlobRead,
    CheckWork,
    Command,
    Effect,
    Emit,
    Fetch,
    Fetched,
    GossipIn,
    Input,
    Inspect,
    Inspected,
    MessageIn,
    OpenMemory,
    PeerDown,
    PeerUp,
    Penalise,
    Post,
    ProfileMade,
    Protect,
    Publish,
    ReadBlob,
    Relink,
    Reply,
    Save,
    ScriptSaid,
    SegmentMade,
    Send,
    Settled,
    StartBench,
    StartWork,
    StepMade,
    StopBench,
    StopWork,
    Suspend,
    Tick,
    WarmBench,
    WorkEnded,
)
from peer.node import Node
from peer.simulated_bench import run_bench
from peer.simulated_faults import SECOND, Faults
from peer.simulated_frauds import WRONG_PRODUCT, answer_of, work_of
from peer.simulated_units import RunningUnit, SimulatedUnits
from peer.simulated_work import CONTENTS, distance_of, findings_of, initial_root
from protocol.codec import blake, encode
from protocol.dispute_player import decode_question
from protocol.errors import IchibaError
from protocol.keys import SigningKey
from protocol.network import Network
from protocol.profile import Gauge
from protocol.profile_task import ProfileSpec
from protocol.script import ScriptSpec
from protocol.sealing import NO_KEYS, Keys
from protocol.task import task_id
from worker.bench import Memory

__all__ = ["Faults", "InvariantBroken", "SimulatedPeer", "Simulation"]

START_NS = 1_700_000_000 * SECOND  # any date: records carry wall-clock times
TICK_NS = SECOND // 4
SEGMENT_NS = 2 * SECOND
DOWN_NS = 8 * SECOND


class InvariantBroken(AssertionError):
    """A promise did not hold; the message says which, when, and the seed that replays it."""


@dataclass
class SimulatedPeer:
    """One machine: its disk (rows and entries survive), its process (the node does not)."""

    name: str
    key: SigningKey
    means: Means
    rows: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)
    hidden: dict[bytes, set[bytes]] = field(default_factory=dict)  # blobs of sealed jobs -> the keys they are given to
    keys: dict[bytes, Keys] = field(default_factory=dict)  # of the sealed work under way
    node: Node | None = None
    life: int = 0  # grows with every start: events meant for an earlier process are dropped
    working: set[bytes] = field(default_factory=set)
    units: dict[bytes, RunningUnit] = field(default_factory=dict)  # of runs, by their work
    crashes: int = 0
    bench_speed: int = 10**10  # operations a second of its device
    bench_lie: str = ""  # "result": another chain's; "memory": another challenge's; "claim": says to be 10 times faster
    device: str = ""  # what it says it is; else its name
    memory: Memory | None = None
    liar: bool = False  # its sandbox gets every segment wrong as a cheat's does, and defends that
    lie: str = WRONG_PRODUCT  # how, if it does: a lie of peer/simulated_frauds.py
    withholds: set[str] = field(default_factory=set)  # names of peers that it serves no blob to
    link_lie: bool = False  # its units' states say that they sent what they did not
    bad_tape: bool = False  # its units' states name tapes that lack what they ask for
    garbles: bool = False  # what its units send from segment 1 on is no tensor
    slanders: bool = False  # its units say that of what they get, from segment 1 on
    silent: bool = False  # it answers no question of a dispute
    noise_ppb: int = 1000  # of the distances that its profiles find: as much to three times as much
    gauges: tuple[Gauge, ...] = ()  # that its profiles name

    def keep(self, work: bytes, blobs: Iterable[bytes]) -> None:
        """What a piece of work made: of a sealed job it is hidden."""
        for blob in blobs:
            if work in self.keys:
                self.hide(blob, self.keys[work])
            self.blobs.add(blob)

    def hide(self, blob: bytes, keys: Keys) -> None:
        """Serve it only to who holds these keys; with NO_KEYS, to nobody."""
        self.hidden.setdefault(blob, set()).update({keys.access(blob)} if keys != NO_KEYS else ())

    def gives(self, blob: bytes, keys: Keys | None) -> bool:
        """Whether it serves a blob to who holds these keys: as peer/blobs.py does."""
        wanted = keys.access(blob) if keys is not None else b""
        return blob in self.blobs and (wanted in self.hidden.get(blob, ()) if wanted else blob not in self.hidden)


class Simulation:
    """See the module docstring. `peers` maps a name to the Means of a peer; keys are drawn from the seed."""

    def __init__(
        self, *, seed: int, keys: dict[str, SigningKey], peers: dict[str, Means], network: Network, faults: Faults
    ):
        self.seed, self.network, self.faults = seed, network, faults
        self.rng = random.Random(seed)
        self.now_ns = START_NS
        self.heap: list[tuple[int, int, str, int, Input]] = []
        self.counter = 0
        self.peers = {name: SimulatedPeer(name, keys[name], means) for name, means in peers.items()}
        self.by_key = {peer.key.public: peer for peer in self.peers.values()}
        self.replies: dict[int, Reply] = {}
        self.tick_ns = TICK_NS  # longer where hours pass in which little happens
        self.log: list[tuple[int, str, str, dict[str, Any]]] = []
        self.penalties: list[tuple[str, str, str]] = []
        self.roots: dict[bytes, bytes] = {}  # checkpoint blob -> state root
        self.units = SimulatedUnits(self)
        for peer in self.peers.values():
            self._boot(peer)

    # --- the world -----------------------------------------------------------------------------------------
    def at(self, delay_ns: int, peer: SimulatedPeer, event: Input) -> None:
        """`event` comes to `peer` after so long, if its process still runs then."""
        self.counter += 1
        heapq.heappush(self.heap, (self.now_ns + delay_ns, self.counter, peer.name, peer.life, event))

    def _load(self, peer: SimulatedPeer, rng: random.Random) -> Node:
        """The node as its disk has it: the ledger rebuilt from its entries, the rest from its rows."""
        ledger = Ledger()
        for entry in peer.entries:
            ledger.post(entry)
        return Node(
            key=peer.key,
            network=self.network,
            rng=rng,
            means=peer.means,
            ledger=ledger,
            rows=lambda table, prefix=b"": [r for r in peer.rows.get(table, {}).items() if r[0].startswith(prefix)],
            now_ns=self.now_ns,
        )

    def _boot(self, peer: SimulatedPeer) -> None:
        """Start the process, then meet the others."""
        peer.life += 1
        peer.working.clear()
        peer.units.clear()
        peer.node = self._load(peer, random.Random(self.rng.getrandbits(64)))
        self._perform(peer, peer.node.handle(Tick(), self.now_ns))
        self.at(self.rng.randrange(TICK_NS), peer, Tick())
        for other in self.peers.values():
            if other is not peer and other.node is not None:
                self.at(self.rng.randrange(SECOND), peer, PeerUp(other.key.public))
                self.at(self.rng.randrange(SECOND), other, PeerUp(peer.key.public))

    def crash(self, name: str, *, for_ns: int = DOWN_NS) -> None:
        """Kill a process now; `for_ns` later it starts again (0: never). One that is down stays down as long as it was
        to: another goodbye could reach the others after the next greeting."""
        peer = self.peers[name]
        if peer.node is None:
            return
        peer.node = None
        peer.life += 1
        peer.crashes += 1
        for other in self.peers.values():
            if other is not peer and other.node is not None:
                self.at(self.rng.randrange(SECOND), other, PeerDown(peer.key.public))
        if for_ns:
            self.counter += 1
            heapq.heappush(self.heap, (self.now_ns + for_ns, self.counter, name, -1, Tick()))

    def command(self, name: str, verb: str, arguments: dict[str, Any]) -> Reply:
        """A person at `name` types a command; answered at once, or when the thread that it takes has ended."""
        peer = self.peers[name]
        assert peer.node is not None
        self.counter += 1
        token = self.counter
        self._perform(peer, peer.node.handle(Command(token, verb, arguments), self.now_ns))
        if token not in self.replies:
            self.run(seconds=1, until=lambda: token in self.replies)
        return self.replies[token]

    # --- running -------------------------------------------------------------------------------------------
    def run(self, *, seconds: float, until: Any = None) -> None:
        """Handle events until the time is over or `until()` is true."""
        end = self.now_ns + int(seconds * SECOND)
        while self.heap and self.heap[0][0] <= end:
            at, _, name, life, event = heapq.heappop(self.heap)
            self.now_ns = at
            peer = self.peers[name]
            if life == -1:
                if peer.node is None:
                    self._boot(peer)
                continue
            if peer.node is None or life != peer.life:
                continue
            self._handle(peer, event)
            self.check(peer)
            if until is not None and until():
                return
        self.now_ns = max(self.now_ns, end) if until is None else self.now_ns

    def _handle(self, peer: SimulatedPeer, event: Input) -> None:
        assert peer.node is not None
        if isinstance(event, Tick):
            self.at(self.tick_ns, peer, event)
        if (
            isinstance(event, ScriptSaid | StepMade | SegmentMade | ProfileMade | WorkEnded)
            and event.work not in peer.working
        ):
            return
        if isinstance(event, StepMade | SegmentMade | WorkEnded) and self.units.stalls(peer, event):
            return
        if isinstance(event, WorkEnded):
            peer.working.discard(event.work)
        if isinstance(event, SegmentMade):
            tape = event.ends.tape if event.ends is not None else b""
            peer.keep(event.work, {event.checkpoint, event.false_checkpoint, tape} - {b""})
        faulty = self.now_ns < START_NS + self.faults.until_ns
        fate = self.rng.random() if faulty and self.faults.crash else 1.0
        effects = peer.node.handle(event, self.now_ns)
        if fate < self.faults.crash / 2:
            self.crash(peer.name)  # before the commit: as if the input had never come
            return
        self._commit(peer, effects)
        if fate < self.faults.crash:
            self.crash(peer.name)  # after the commit, before anything was sent
            return
        self._perform(peer, effects, committed=True)

    @staticmethod
    def _commit(peer: SimulatedPeer, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Save):
                table = peer.rows.setdefault(effect.table, {})
                if effect.value is None:
                    table.pop(effect.key, None)
                else:
                    table[effect.key] = effect.value
            elif isinstance(effect, Post):
                peer.entries.append(effect.entry)

    def _perform(self, peer: SimulatedPeer, effects: list[Effect], *, committed: bool = False) -> None:
        if not committed:
            self._commit(peer, effects)
        for effect in effects:
            match effect:
                case Send(peer=target, data=data):
                    other = self.by_key.get(target)
                    if other is not None:
                        self._deliver(other, MessageIn(peer.key.public, data))
                case Publish(topic=topic, data=data):
                    for other in self.peers.values():
                        if other is not peer:
                            self._deliver(other, GossipIn(topic, peer.key.public, data))
                case Fetch():
                    self._fetch(peer, effect)
                case Protect(blobs=blobs, keys=keys):
                    for blob in blobs:
                        peer.hide(blob, keys)
                case ReadBlob(blob=blob, token=token):
                    here = blob in peer.blobs and blob in CONTENTS
                    read = BlobRead(blob, token, CONTENTS[blob]) if here else BlobRead(blob, token, error="not here")
                    self.at(1 + self.rng.randrange(SECOND // 20), peer, read)
                case Inspect():
                    self._inspect(peer, effect)
                case StartWork():
                    self._work(peer, effect)
                case StopWork(work=work):
                    peer.working.discard(work)
                case Relink(work=work, order=order):
                    self.units.relink(peer, work, order)
                case Settled():
                    pass  # a simulated disk is never full
                case Suspend():
                    peer.working.clear()
                case WarmBench() | StartBench() | OpenMemory() | StopBench() | CheckWork():
                    run_bench(self, peer, effect)
                case Emit(kind=kind, data=data):
                    self.log.append((self.now_ns, peer.name, kind, data))
                case Reply():
                    self.replies[effect.token] = effect
                case Penalise(peer=target, reason=reason):
                    accused = self.by_key[target].name if target in self.by_key else target.hex()
                    self.penalties.append((peer.name, accused, reason))
                case Round() | PlaceUnits() | ChooseUnits():
                    self.at(1 + SECOND // 10, peer, effect.play())

    def _deliver(self, target: SimulatedPeer, event: Input) -> None:
        faulty = self.now_ns < START_NS + self.faults.until_ns
        copies = 1
        if faulty:
            if self.rng.random() < self.faults.loss:
                copies = 0
            elif self.rng.random() < self.faults.duplication:
                copies = 2
        for _ in range(copies):
            self.at(1 + self.rng.randrange(self.faults.delay_ns_max), target, event)

    def _fetch(self, peer: SimulatedPeer, effect: Fetch) -> None:
        holders = [self.by_key[p] for p in effect.peers if p in self.by_key]
        here = effect.blob in peer.blobs or any(
            h.node is not None and h.gives(effect.blob, effect.keys) and peer.name not in h.withholds for h in holders
        )
        error, forged = "", False
        if not here:
            error = "no peer has it"
        elif effect.state_root and self.roots.get(effect.blob) != effect.state_root:
            error, forged = "its state root is another one", True
        elif effect.blob not in peer.blobs or effect.keys is not None:
            peer.keys.update({effect.token: effect.keys} if effect.keys is not None else {})
            peer.keep(effect.token, [effect.blob])
        ends = self.units.ends.get(effect.blob) if effect.links and not error else None
        self.at(1 + self.rng.randrange(SECOND // 5), peer, Fetched(effect.blob, effect.token, error, forged, ends=ends))

    def _work(self, peer: SimulatedPeer, order: StartWork) -> None:
        """A worker: the same inputs give the same states, a cheat gives others."""
        peer.working.add(order.work)
        peer.keys.update({order.work: order.keys} if order.keys is not None else {})
        if isinstance(order.task, ScriptSpec):
            self._script(peer, order, order.task)
            return
        if isinstance(order.task, ProfileSpec):
            self._profile(peer, order, order.task)
            return
        if order.base:
            root = self.roots[order.base]
        else:
            root = initial_root(order.task.seed)
        segments = range(order.first_segment, order.last_segment)
        if order.run is not None:
            self.units.start(peer, order, root)
            return
        if self.units.lacks(order):
            self.at(SEGMENT_NS, peer, WorkEnded(order.work, "bad-tape: an entry that a step asks for is not there"))
            return
        ends = work_of(order.task, segments, root, peer.lie if peer.liar else order.cheat, order.gauges)
        for index, (segment, (root, out)) in enumerate(zip(segments, ends, strict=True)):
            blob = blake("sim/blob", out)
            self.roots[blob] = out
            at = (index + 1) * SEGMENT_NS
            steps = order.task.steps_of(segment)
            self.at(at - SEGMENT_NS // 2, peer, StepMade(order.work, steps.start, 1.0 / (1 + steps.start)))
            made = SegmentMade(order.work, segment, root, out, (1.0 / (1 + segment),), 1, blob, 1000)
            if order.ordered is not None and order.ordered[0] == segment:
                ((_, false),) = work_of(order.task, range(segment, segment + 1), root, WRONG_PRODUCT)
                false_blob = blake("sim/blob", false)
                self.roots[false_blob] = false
                made = replace(made, false_root=false, false_checkpoint=false_blob, false_bytes=1000)
            if order.compare:
                made = replace(made, distance=distance_of(root, out, self.roots[order.compare], order.gauges))
            self.at(at, peer, made)
        self.at((order.last_segment - order.first_segment) * SEGMENT_NS + 1, peer, WorkEnded(order.work))

    def _inspect(self, peer: SimulatedPeer, order: Inspect) -> None:
        """A sandbox that answers a question of a dispute; a replay takes as long as the segment took."""
        if peer.silent:
            return
        asked = decode_question(order.question)
        took, body, opening, state, error = SECOND // 4, b"", b"", b"", ""
        if order.base and order.base not in peer.blobs:
            error = "the base is not here"
        else:
            cheat = peer.lie if peer.liar else peer.means.cheat
            claimed = self.roots[order.claimed] if order.claimed else b""
            about = order.question, order.task, asked.segment, asked.in_root
            try:
                found = answer_of(*about, cheat=cheat, claimed=claimed)
            except IchibaError as failure:
                error = str(failure)
            else:
                body, opening = found.body, found.opening
                took = took if order.base.startswith(b"state") else SEGMENT_NS
                if found.wants_state:
                    state = b"state" + blake("sim/before", order.question)[5:]
                    peer.blobs.add(state)
        event = Inspected(order.work, order.question, body, opening, state, error)
        self.at(took, peer, event)

    def _script(self, peer: SimulatedPeer, order: StartWork, script: ScriptSpec) -> None:
        """A script that runs half its time; one with a seed leaves other outputs on each machine."""
        used_ns = script.operations_per_step // 2
        out = blake("sim/outputs", encode(script.command), peer.key.public if script.seed else b"")
        blob = blake("sim/blob", out)
        self.roots[blob] = out
        self.at(used_ns // 2, peer, ScriptSaid(order.work, "half way", used_ns // 2))
        made = SegmentMade(order.work, 0, task_id(script), out, (), used_ns, blob, 1000)
        self.at(used_ns, peer, made)
        self.at(used_ns + 1, peer, WorkEnded(order.work))

    def _profile(self, peer: SimulatedPeer, order: StartWork, spec: ProfileSpec) -> None:
        """A profile whose distances are drawn: simulated arithmetic is exact and has no noise of its own."""
        found = findings_of(self.rng, peer.noise_ppb, peer.gauges)
        took = SEGMENT_NS * spec.steps_run // spec.of.steps_per_segment
        for done in range(1, spec.steps_run, max(1, spec.steps_run // 4)):
            self.at(took * done // spec.steps_run, peer, StepMade(order.work, done, 1.0))
        self.at(took, peer, ProfileMade(order.work, found, operations_per_second=10**9))
        self.at(took + 1, peer, WorkEnded(order.work))

    # --- promises ------------------------------------------------------------------------------------------
    def check(self, peer: SimulatedPeer) -> None:
        """What must hold after every event on every peer."""
        if peer.node is None:
            return
        deposits = sum(d.free_micro + d.stake_micro for d in self.network.deposits)
        ledger = peer.node.desk.ledger
        if ledger.total_micro() != deposits:
            self._broken(f"{peer.name} holds {ledger.total_micro()} of {deposits} micro-credits")
        for deal_id, deal in peer.node.solver.deals.items():
            channel = peer.node.settler.channels.get(deal_id)
            if channel is not None and deal.cumulative_micro > channel.agreement.channel_micro:
                self._broken(f"{peer.name} was promised more than the channel holds")
        active = peer.node.solver.slots_free()
        if active < 0:
            self._broken(f"{peer.name} double-booked its slot")

    def check_quiet(self) -> None:
        """What must hold when everything has come to rest: one ledger, no open money, every promise paid."""
        nodes = [peer.node for peer in self.peers.values() if peer.node is not None]
        logs = {node.settler.digest() for node in nodes}
        if len(logs) != 1:
            self._broken(f"settlement logs differ: {sorted(count for count, _ in logs)}")
        balances = {tuple(sorted(node.desk.ledger.balances().items())) for node in nodes}
        if len(balances) != 1:
            self._broken("ledgers differ")
        for peer in self.peers.values():
            self._check_restart(peer)
        for node in nodes:
            node.desk.ledger.check()
            for deal_id, channel in node.settler.channels.items():
                if not channel.closed:
                    self._broken(f"channel {deal_id.hex()[:12]} is still open")
                deal = node.solver.deals.get(deal_id)
                if deal is not None and channel.closed != "slashed" and channel.paid_micro < deal.cumulative_micro:
                    self._broken(f"{channel.paid_micro} paid, vouchers promised {deal.cumulative_micro}")

    def _check_restart(self, peer: SimulatedPeer) -> None:
        """A process started from this disk now knows the same money, and its first tick finds nothing to change."""
        if peer.node is None:
            return
        again = self._load(peer, random.Random(0))
        effects = again.handle(Tick(), self.now_ns)
        troubles = [e for e in effects if isinstance(e, Post) or (isinstance(e, Emit) and e.kind == "problem")]
        if troubles:
            self._broken(f"{peer.name} restarts into other money: {troubles}")
        if again.settler.digest() != peer.node.settler.digest():
            self._broken(f"{peer.name} restarts with another settlement log")
        if again.desk.ledger.balances() != peer.node.desk.ledger.balances():
            self._broken(f"{peer.name} restarts with another ledger")
        open_now = {i for i, channel in peer.node.settler.channels.items() if not channel.closed}
        if {i for i, channel in again.settler.channels.items() if not channel.closed} != open_now:
            self._broken(f"{peer.name} restarts with other open channels")

    def _broken(self, what: str) -> None:
        at = (self.now_ns - START_NS) / SECOND
        raise InvariantBroken(f"seed {self.seed}, at {at:.2f} s: {what}")
