"""The daemon: one node, its disk, its network and its workers, run by trio.

In which order the node is told, commits and sends stands in peer/turns.py. Here: what people ask of it, what they are
told, and how it all starts and ends.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from peer.blobs import PROTOCOL as BLOB_PROTOCOL
from peer.blobs import BlobStore
from peer.clock import Clock
from peer.control import serve_control
from peer.cosigning import foresee
from peer.desk import MARKET, SETTLEMENT, Means
from peer.device import Device, find_device
from peer.drops import OURS, merged
from peer.effects import Performer
from peer.events import Command, Effect, Input, Reply, Tick
from peer.guest_watch import RULES_FILE, GuestWatch
from peer.home import Home
from peer.host import Host, HostConfig, PeerUnreachable, open_host
from peer.intake import records_in, refuse_bundle
from peer.invite import decode_invite, encode_invite
from peer.link_shaper import parse_shaper
from peer.node import Node
from peer.store import Store
from peer.suspension import SuspendedStates
from peer.tensor_links import PROTOCOL as TENSOR_PROTOCOL
from peer.tensor_links import TensorLinks
from peer.turns import Turns, open_clock
from peer.unit_work import UnitRunner
from peer.verifying import Verifier
from peer.workshop import Workshop
from protocol import keys, params
from protocol.errors import CorruptStore, IchibaError, NotFound
from protocol.keys import SigningKey
from protocol.link_report import LinkTimed
from protocol.network import Network
from protocol.script import blobs_of, read_task
from protocol.sealing import check_sealable
from protocol.task import TaskSpec
from worker.sandbox import Level, SandboxTooWeak, doctor_lines

__all__ = ["CommandFailed", "Daemon", "DaemonConfig", "run_daemon"]

log = logging.getLogger(__name__)


class CommandFailed(IchibaError):
    """The node refused a command; carries its error as it was."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["what"], why=error["why"], next_step=error["next"])
        self.code, self.exit_code = error["code"], error["exit_code"]


@dataclass(frozen=True)
class DaemonConfig:
    """What `ichiba up` is told. `roles` is a bit set (protocol.records); prices in micro-credits per Gop."""

    data_dir: Path
    network_file: Path
    listen: list[str]
    peers: tuple[str, ...] = ()
    mdns: bool = True
    roles: int = 0
    unit_price: int = 0
    fixed_price: bool = False  # ask just that (peer/pricing.py)
    memory_bytes: int = 2 << 30
    slots: int = 1
    cheat: str = ""
    shape: str = ""  # of its links, where they are to be slower than they are (peer/link_shaper.py)
    passphrase: str | None = field(default=None, repr=False)  # of a sealed key


@dataclass
class Daemon:
    """The running daemon, as the control socket sees it."""

    config: DaemonConfig
    network: Network
    store: Store
    blobs: BlobStore
    host: Host
    node: Node
    workshop: Workshop | None
    performer: Performer
    inbox: trio.MemorySendChannel[Input]
    verifier: Verifier
    clock: Clock
    tensors: TensorLinks
    sandbox_note: str = ""
    turns: Turns = field(init=False)
    device: Device = field(default_factory=Device)
    stopped: trio.Event = field(default_factory=trio.Event)
    opening: trio.Lock = field(default_factory=trio.Lock)
    replies: dict[int, tuple[trio.Event, list[Reply]]] = field(default_factory=dict)
    listeners: dict[int, tuple[str | None, trio.MemorySendChannel[dict[str, Any]]]] = field(default_factory=dict)
    general: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=1000))  # events of no job
    token: int = 0

    def __post_init__(self) -> None:
        self.turns = Turns(
            handle=self.node.handle, store=self.store, verifier=self.verifier, clock=self.clock,
            perform=self._perform, tell=self._tell, foresee=partial(foresee, self.node.submitter),
        )  # fmt: skip

    # --- for the control socket ----------------------------------------------------------------------------
    async def command(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One verb of peer/commands.py. Raises CommandFailed."""
        units = arguments["units"] if verb == "submit-run" else []
        for one in [arguments] if verb == "submit" else units:
            self._require_blobs(one)
        if any(unit.get("kept") for unit in units):
            await self.open_sandbox()
        self.token += 1
        token, ready, box = self.token, trio.Event(), list[Reply]()
        self.replies[token] = (ready, box)
        try:
            await self.inbox.send(Command(token, verb, arguments))
            await ready.wait()
        finally:
            del self.replies[token]
        if box[0].error is not None:
            raise CommandFailed(box[0].error)
        result: dict[str, Any] = box[0].result
        if verb == "status":
            checks = {"computed": keys.verified.computed, "remembered": keys.verified.remembered}
            result = result | {
                "addresses": self.host.addresses,
                "network_stats": self.host.stats(),
                "traffic": dict(self.performer.counters),
                "signature_checks": checks,
                "drops": self.drops()["reasons"],
                "restored_listens": self.node.restored.listening,
                "clock_off_ns": self.turns.time.wall_ns - self.turns.time.now_ns,
            }
        elif verb == "drops":
            result = self.drops()
        elif verb == "pause":
            result = result | await self.performer.suspended()
        return result

    async def open_sandbox(self) -> None:
        """Prove the sandbox of a peer that works for nobody else, for units of its own runs that it keeps. Again:
        nothing."""
        async with self.opening:
            if self.workshop is None and not self.config.roles:
                await self.performer.nursery.start(self._hold_sandbox)

    async def _hold_sandbox(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        async with AsyncExitStack() as stack:
            self.workshop, self.sandbox_note = await _open_workshop(stack, self.config)
            self.performer.workshop = self.workshop
            if self.workshop is not None:
                self.node.desk.means = replace(self.node.desk.means, sandbox=int(self.workshop.report.level))
            task_status.started()
            if self.workshop is not None:
                await trio.sleep_forever()

    def drops(self) -> dict[str, Any]:
        """What this process dropped, wherever that was (peer/drops.py)."""
        return merged(self.host.drops, self.node.desk.drops, self.performer.drops)

    def _require_blobs(self, arguments: dict[str, Any]) -> None:
        """A job whose program or data is not here could never be served to a solver: refuse it at once."""
        try:
            task = read_task(bytes.fromhex(str(arguments.get("task", ""))), network=self.network.id)
        except ValueError:
            raise NotFound("the task is not hex") from None
        wanted = set(blobs_of(task))
        if isinstance(task, TaskSpec) and task.initial.kind == "state":
            wanted.add(task.initial.blob)
        for blob in wanted:
            if not self.blobs.has(blob):
                raise NotFound(f"blob {blob.hex()[:12]} of the task is not here", next_step="upload it first")
            if arguments.get("sealed"):
                check_sealable(self.blobs.size(blob))
            self.blobs.pin(blob)

    @asynccontextmanager
    async def subscribe(self, job: str | None) -> AsyncIterator[trio.MemoryReceiveChannel[dict[str, Any]]]:
        """Live events, of one job (hex) or all. A listener that does not read loses the newest, never the daemon."""
        send, receive = trio.open_memory_channel[dict[str, Any]](params.LISTENER_EVENTS_MAX)
        self.token += 1
        token = self.token
        self.listeners[token] = (job, send)
        try:
            yield receive
        finally:
            del self.listeners[token]
            send.close()

    def history(self, job: str | None, since: int = 0) -> list[dict[str, Any]]:
        """Past events with a `seq` above `since`, oldest first."""
        if job is None:
            return [event for event in self.general if event["seq"] > since]
        found: list[dict[str, Any]] = []
        cursor = 0
        while True:
            page = self.store.events(job, since=cursor)
            found += [event for line in page if (event := json.loads(line.line))["seq"] > since]
            if not page:
                return found
            cursor = page[-1].seq

    async def connect(self, address_or_invite: str) -> dict[str, Any]:
        """Dial a multiaddr or every address of an invite. Raises the first error if none answers."""
        addresses = [address_or_invite]
        if address_or_invite.startswith("ichiba1"):
            addresses = decode_invite(address_or_invite, network=self.network.id).addresses
        failure: IchibaError | None = None
        for address in addresses:
            try:
                await self.host.connect(address)
            except IchibaError as error:
                failure = failure or error
            else:
                return {"connected": address}
        assert failure is not None
        raise failure

    def invite(self) -> str:
        """A string another peer's `--peer` takes."""
        return encode_invite(self.network.id, self.host.addresses)

    def doctor(self) -> list[dict[str, Any]]:
        """The checks of `ichiba doctor` that need the running daemon."""
        lines = []
        if self.workshop is not None:
            keys = ("what", "level", "explanation", "fix")
            lines = [dict(zip(keys, map(str, line), strict=True)) for line in doctor_lines(self.workshop.report)]
        elif self.sandbox_note:
            lines = [{"what": "sandbox", "level": "bad", "explanation": self.sandbox_note, "fix": "see above"}]
        lines.append(self._clock_line())
        if self.workshop is not None:
            name = f"a graphics card: {self.device.name}" if self.device.kind == "gpu" else "the processor"
            level, words = ("warn", self.device.note) if self.device.note else ("ok", f"work runs on {name}")
            lines.append({"what": "device", "level": level, "explanation": words, "fix": ""})
        peers = len(self.host.peers())
        lines.append(
            {
                "what": "peers",
                "level": "ok" if peers else "warn",
                "explanation": f"{peers} peers are connected",
                "fix": "" if peers else "ichiba up --peer INVITE, with an invite from `ichiba status` of another peer",
            }
        )
        drops = self.drops()["reasons"]
        ours = {reason: drops[reason] for reason in OURS if drops.get(reason)}
        told = ", ".join(f"{count} {reason}" for reason, count in (ours or drops).items()) or "nothing"
        lines.append(
            {
                "what": "drops",
                "level": "warn" if ours else "ok",
                "explanation": f"dropped since the start: {told}",
                "fix": "ichiba drops says whose and why" if drops else "",
            }
        )
        return lines

    def _clock_line(self) -> dict[str, Any]:
        """Whether a jump of the clock still shows."""
        late_s = (self.turns.time.wall_ns - self.turns.time.now_ns) / 1e9
        if abs(late_s) * 1e9 <= params.CLOCK_STEP_NS:
            return {"what": "time", "level": "ok", "explanation": "deadlines run with the clock", "fix": ""}
        where = "behind" if late_s > 0 else "ahead of"
        words = f"since a jump of the clock deadlines run {abs(late_s):,.0f} s {where} it"
        fix = "restart the daemon when no deal is open" if late_s > 0 else "none is needed: no deadline is cut short"
        return {"what": "time", "level": "warn", "explanation": words, "fix": fix}

    def stop(self) -> None:
        """Ask the daemon to end cleanly."""
        self.stopped.set()

    # --- the loop ------------------------------------------------------------------------------------------
    async def run(self, inputs: trio.MemoryReceiveChannel[Input]) -> None:
        """Handle inputs until stopped. Raises what the store raises that cannot commit."""
        await self.turns.run(inputs)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Reply(token=token):
                if token in self.replies:
                    self.replies[token][1].append(effect)
                    self.replies[token][0].set()
            case _:
                self.performer.perform(effect)

    def _tell(self, event: dict[str, Any]) -> None:
        if event["kind"] in ("bid", "case") and self.workshop is not None:
            self.workshop.prewarm()  # work is likely: have a worker ready when it comes
        if event["job"] is None:
            self.general.append(event)
            if event["kind"] not in ("offer-seen", "refused-bytes", "ignored"):  # strangers choose how many of those
                log.info("%s %s", event["kind"], {k: v for k, v in event.items() if k not in ("seq", "time_ns", "job")})
        for job, channel in self.listeners.values():
            if job is None or job == event["job"]:
                try:
                    channel.send_nowait(event)
                except trio.WouldBlock:
                    self.performer.counters["events-dropped"] += 1


async def _open_workshop(stack: AsyncExitStack, config: DaemonConfig) -> tuple[Workshop | None, str]:
    """The workshop where the sandbox holds; else None and why."""
    try:
        workshop = await stack.enter_async_context(Workshop(config.data_dir / "scratch", pool=1))
    except SandboxTooWeak as error:
        log.error("no work is taken: %s", error)
        return None, str(error)
    return workshop, ""


def _means(config: DaemonConfig, workshop: Workshop | None, device: Device) -> Means:
    """What this peer brings to the market: without a sandbox that holds, no work at all."""
    return Means(
        roles=config.roles if workshop is not None else 0,
        unit_price=config.unit_price,
        fixed_price=config.fixed_price,
        memory_bytes=config.memory_bytes,
        sandbox=int(workshop.report.level if workshop is not None else Level.NONE),
        slots=config.slots,
        cheat=config.cheat,
        device=device.kind,
        device_memory_bytes=device.memory_bytes,
    )


async def run_daemon(config: DaemonConfig, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Run one peer until it is stopped or cancelled. Starts with a Daemon once it serves its control socket.

    Raises IchibaError for what a person can mend (a port in use, a locked data directory, a damaged store).
    """
    home = Home(config.data_dir)
    network, seed = home.network(config.network_file), home.seed(config.passphrase)
    key = SigningKey.from_seed(seed)
    async with AsyncExitStack() as stack:
        store = stack.enter_context(await trio.to_thread.run_sync(Store.open, config.data_dir, network.id, key.public))
        blobs = BlobStore(config.data_dir / "blobs", params.BLOB_STORE_BYTES_MAX)
        workshop, note = await _open_workshop(stack, config) if config.roles else (None, "")  # a submitter needs none
        device = await trio.to_thread.run_sync(find_device, workshop.devices) if workshop is not None else Device()
        means = _means(config, workshop, device)
        host = await stack.enter_async_context(
            open_host(
                HostConfig(
                    seed=seed,
                    listen=config.listen,
                    topics=(MARKET, SETTLEMENT),
                    mdns=config.mdns,
                    network_tag=network.id.hex()[:16],
                    validator=refuse_bundle,
                    records_in=records_in,
                    shaper=parse_shaper(config.shape) if config.shape else None,
                )
            )
        )
        clock = open_clock(store)
        node = Node(
            key=key,
            network=network,
            rng=random.SystemRandom(),
            means=means,
            ledger=store.ledger(),
            rows=lambda table, prefix=b"": list(store.rows(table, prefix)),
            now_ns=clock.now_ns,
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        send, receive = trio.open_memory_channel[Input](params.INBOX_MAX)
        states = SuspendedStates(config.data_dir / "suspended")
        tensors = TensorLinks(host, config.data_dir / "tensors", nursery)
        units = UnitRunner(tensors, blobs, send, config.data_dir / "tapes")
        performer = Performer(host, blobs, workshop, nursery, send, states, units)
        verifier = stack.enter_context(closing(Verifier(network.id)))
        daemon = Daemon(
            config, network, store, blobs, host, node, workshop, performer, send, verifier, clock, tensors, note, device
        )
        host.serve(BLOB_PROTOCOL, blobs.serve)
        host.serve(TENSOR_PROTOCOL, daemon.tensors.serve)
        if node.runs.keeps():
            await daemon.open_sandbox()
        nursery.start_soon(daemon.run, receive)
        nursery.start_soon(_pump, host, send)
        nursery.start_soon(_tick, send)
        nursery.start_soon(_tell_drops, daemon)
        nursery.start_soon(_time_links, host, send)
        if not store.checked_whole:
            nursery.start_soon(_check_store, config.data_dir)
        if config.roles:
            nursery.start_soon(GuestWatch(config.data_dir / RULES_FILE, daemon.command).run)
        for address in (*network.bootstrap, *config.peers):
            nursery.start_soon(_dial, daemon, address)
        await nursery.start(serve_control, daemon, home.control_socket)
        task_status.started(daemon)
        await daemon.stopped.wait()
        nursery.cancel_scope.cancel()


async def _pump(host: Host, send: trio.MemorySendChannel[Input]) -> None:
    async for event in host.events:
        await send.send(event)


async def _tell_drops(daemon: Daemon) -> None:
    """Log what was dropped, a line a reason, at a rate that no stranger can raise."""
    while True:
        await trio.sleep(params.DROP_NEWS_SECONDS)
        for drops in (daemon.host.drops, daemon.node.desk.drops, daemon.performer.drops):
            for line in drops.news():
                log.warning("%s", line)


async def _tick(send: trio.MemorySendChannel[Input]) -> None:
    while True:
        await trio.sleep(params.TICK_MS / 1000)
        await send.send(Tick())


async def _time_links(host: Host, send: trio.MemorySendChannel[Input]) -> None:
    """Time a round trip to each peer now and then, one after the other."""
    while True:
        await trio.sleep(params.LINK_TIME_SECONDS)
        for peer in sorted(host.peers())[: params.PEERS_TIMED_MAX]:
            with suppress(PeerUnreachable):
                await send.send(LinkTimed(peer, int(1000 * await host.measure(peer))))


async def _check_store(directory: Path) -> None:
    """Verify what the start of a large store did not read. Raises CorruptStore: a damaged store ends the daemon."""
    command = [sys.executable, "-P", "-m", "peer.store_check", str(directory)]
    done = await trio.run_process(command, capture_stdout=True, check=False)
    if not done.returncode:
        log.info("the store is whole: %s", done.stdout.decode().strip())
        return
    try:
        said = json.loads(done.stdout)
    except ValueError:
        log.warning("the store was not checked: `%s` ended with %d", " ".join(command), done.returncode)
        return
    error = CorruptStore(said["what"], why=said["why"], next_step=said["next"])
    if said["code"] != CorruptStore.code:
        log.warning("the store was not checked: %s", error)
        return
    raise error


async def _dial(daemon: Daemon, address: str) -> None:
    """Reach a peer given by hand, for as long as it takes; the host keeps the connection afterwards."""
    delay_s = params.REDIAL_SECONDS_MIN
    while True:
        try:
            await daemon.connect(address)
        except IchibaError as error:
            log.warning("cannot reach %s: %s", address, error)
        else:
            return
        await trio.sleep(delay_s)
        delay_s = min(2 * delay_s, params.REDIAL_SECONDS_MAX)
