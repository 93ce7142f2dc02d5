"""A market for adversaries: a simulation in which some nodes follow a strategy, and what came of it, in figures.

The honest roles are alice, who submits; bob and carol, who solve, of whom bob is the cheaper; victor and vera, who
verify; wendy, the whistleblower; and four notaries, or none. A strategy wraps the node of one of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from market.entries import BURNED, POOL, Account
from peer.desk import Means
from peer.events import Effect, Input
from peer.node import Node
from peer.simulator import START_NS, Faults, SimulatedPeer, Simulation
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from tests.dispute_swarm import CALM, COURT_RULES
from tests.swarm_scenario import job_state, submit

__all__ = ["FREE_MICRO", "STAKE_MICRO", "Outcome", "Stage", "Strategy", "play", "stage_of"]

SECOND = 10**9
FREE_MICRO, STAKE_MICRO = 100_000_000, 50_000_000
NOTARIES = 4
ROLES = {"alice": 0, "bob": 1, "carol": 1, "victor": 2, "vera": 2, "wendy": 4}
JURORS = ("viola", "vincent")  # verifiers more, of tolerant work
JOB_SECONDS_MAX = 3600  # of simulated time; a job that is not over by then is not bounded
CHALLENGE_MS = 20_000
# The window of challenges, and two comparisons of logs, from when no message is lost any more: a peer that hears of a
# settlement by a comparison after the faults frees its lock that much later (seed 1017: 45 s after the others).
REST_SECONDS = 60
LATE_NS = 40 * 10**9  # how long those who come late are away: until the first checkers were asked
_RULES = {**{name: getattr(COURT_RULES, name) for name in Rules.__struct_fields__}, "challenge_ms": CHALLENGE_MS}


class Strategy:
    """How one peer deviates. Whatever it does not name its node does as any other: it is a real one.

    cheat: a fraud of worker/cheats.py. lie: of its sandbox as a checker (peer/simulated_frauds.py). silent: it answers
    no question of a dispute. withholds: the names of those whom it serves no blob.
    """

    cheat = ""
    lie = ""
    silent = False
    withholds: frozenset[str] = frozenset()

    def plug(self, node: Node, stage: Stage) -> None:
        """Change the node at each start of its process."""

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """What its node hears of what happens; None: nothing. Ticks always come."""
        return event

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """What it makes of what its node wants done. The store has it already."""
        return effects


@dataclass(frozen=True)
class Outcome:
    """What came of one job. Money in micro-credits, gained (or lost, below 0) since the network's start.

    findings: how the notaries found each dispute, or `slash` of a quorum of checkers, sorted. level, cause: of the
    ruling that convicted somebody, else of the last one. lock: of the solver that was convicted; word: what a checker's
    word is worth. delay_s: from the offer to the
    job's end, in simulated seconds. delivered: whether the result is the one of honest work.
    """

    state: str
    retried: int
    final_root: str
    findings: tuple[str, ...]
    level: str
    cause: str
    lock: int
    word: int
    stakes: Mapping[str, int]
    free: Mapping[str, int]
    burned: int
    pool: int
    delay_s: float
    penalised: frozenset[str] = field(default_factory=frozenset)

    @property
    def culprits(self) -> dict[str, int]:
        """Who lost how much of its stake."""
        return {name: -micro for name, micro in self.stakes.items() if micro < 0}


class Stage(Simulation):
    """A simulation with strategies. cast: the strategy of each dishonest peer, by its name."""

    late: tuple[str, ...] = ()
    tolerant = False

    def __init__(
        self, cast: Mapping[str, Strategy], *, seed: int, keys: dict[str, SigningKey], peers: dict[str, Means],
        network: Network, faults: Faults,
    ) -> None:  # fmt: skip
        self.cast, self.gone = dict(cast), set[str]()  # gone: who left for good
        means = {name: replace(mine, cheat=cast[name].cheat) if name in cast else mine for name, mine in peers.items()}
        super().__init__(seed=seed, keys=keys, peers=means, network=network, faults=faults)
        for name, strategy in cast.items():
            peer = self.peers[name]
            peer.liar, peer.lie = bool(strategy.lie), strategy.lie or peer.lie
            peer.silent, peer.withholds = strategy.silent, set(strategy.withholds)

    def _load(self, peer: SimulatedPeer, rng: random.Random) -> Node:
        node = super()._load(peer, rng)
        if peer.name in self.cast:
            self.cast[peer.name].plug(node, self)
        return node

    def _handle(self, peer: SimulatedPeer, event: Input) -> None:
        heard = self.cast[peer.name].hears(event, self) if peer.name in self.cast else event
        if heard is not None:
            super()._handle(peer, heard)

    def _perform(self, peer: SimulatedPeer, effects: list[Effect], *, committed: bool = False) -> None:
        if not committed:
            self._commit(peer, effects)
        if peer.name in self.cast and peer.node is not None:
            effects = self.cast[peer.name].does(effects, peer.node, self)
        super()._perform(peer, effects, committed=True)

    def node(self, name: str) -> Node:
        """The node of a peer that is up."""
        node = self.peers[name].node
        assert node is not None, f"{name} is down"
        return node

    def public(self, name: str) -> bytes:
        """A peer's key."""
        return self.peers[name].key.public


def stage_of(
    seed: int, cast: Mapping[str, Strategy], faults: Faults = CALM, *, notaries: int = NOTARIES,
    without: tuple[str, ...] = (), late: tuple[str, ...] = (), noise_ppb: int = 0, **rules: int,
) -> Stage:  # fmt: skip
    """A market with these strategies in it. without: whom there is not; late: who comes when the first checkers were
    asked. noise_ppb: what profiles find of a job that is tolerant then, with verifiers more to sit on a jury. rules:
    that differ from COURT_RULES."""
    rng = random.Random(seed)
    roles = ROLES | dict.fromkeys(JURORS if noise_ppb else (), 2)
    names = [*roles, *(f"notary{number}" for number in range(notaries))]
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in names}
    names = [name for name in names if name not in without]
    deposits = tuple(
        Deposit(peer_name(keys[name].public), FREE_MICRO if name == "alice" else 0, STAKE_MICRO) for name in names
    )
    network = Network(
        "adversaries",
        Rules(**{**_RULES, **rules}),
        deposits,
        notaries=tuple(peer_name(keys[name].public) for name in names if name.startswith("notary")),
    )
    means = {
        name: Means(roles=roles.get(name, 0), unit_price=1000 if name == "bob" else 1100, memory_bytes=2**30, sandbox=4)
        for name in names
    }
    stage = Stage(cast, seed=seed, keys=keys, peers=means, network=network, faults=faults)
    stage.late, stage.tolerant = late, bool(noise_ppb)
    for peer in stage.peers.values():
        peer.noise_ppb = noise_ppb or peer.noise_ppb
    return stage


def play(stage: Stage) -> Outcome:
    """One job from its offer to rest, and what came of it. Raises InvariantBroken.

    Alice may have left for good; then it is over when her partners' channels are closed.
    """
    stage.run(seconds=3)
    if not stage.tolerant:
        _delay(stage)
    while stage.peers["alice"].node is None:
        stage.run(seconds=3)
    job, begun_ns = submit(stage, mode="tolerant" if stage.tolerant else "exact"), stage.now_ns
    if stage.tolerant and stage.late:  # they profile it first
        stage.run(seconds=JOB_SECONDS_MAX, until=lambda: job_state(stage, job).get("state") == "running")
        _delay(stage)
    stage.run(seconds=JOB_SECONDS_MAX, until=lambda: _over(stage))
    delay_s = (stage.now_ns - begun_ns) / SECOND
    shown = job_state(stage, job)
    faults_left_ns = max(0, START_NS + stage.faults.until_ns - stage.now_ns)
    stage.run(seconds=faults_left_ns / SECOND + REST_SECONDS)
    stage.check_quiet()
    level, cause = _ground(stage)
    ledger = next(peer.node for peer in stage.peers.values() if peer.node is not None).desk.ledger

    def gained(bucket: str) -> dict[str, int]:
        deposited = {d.peer: (d.free_micro, d.stake_micro)[bucket == "stake"] for d in stage.network.deposits}
        return {
            name: ledger.balance_micro(Account(peer.key.public, bucket)) - deposited[peer_name(peer.key.public)]
            for name, peer in stage.peers.items()
        }

    return Outcome(
        state=str(shown.get("state", "")),
        retried=int(str(shown.get("retried", 0))),
        final_root=str(shown.get("final_root", "")),
        findings=_findings(stage),
        level=level,
        cause=cause,
        lock=sum(
            {
                d["deal"]: d["lock_micro"] for _, who, kind, d in stage.log if (who, kind) == ("alice", "slashed")
            }.values()
        ),
        word=stage.network.rules.checker_stake_min_micro,
        stakes=gained("stake"),
        free=gained("free"),
        burned=ledger.balance_micro(BURNED),
        pool=ledger.balance_micro(POOL),
        delay_s=delay_s,
        penalised=frozenset(accused for _, accused, _ in stage.penalties),
    )


def _delay(stage: Stage) -> None:
    for name in stage.late:  # it has met the others, or they would go on believing that it is there
        stage.crash(name, for_ns=LATE_NS)


def _over(stage: Stage) -> bool:
    alice = stage.peers["alice"].node
    if "alice" not in stage.gone:
        return alice is not None and not any(job.open for job in alice.jobs.jobs.values())
    held = [peer.node.settler.channels for peer in stage.peers.values() if peer.node is not None]
    return all(channel.closed for channels in held for channel in channels.values())


def _slashed(stage: Stage) -> bool:
    return any(kind == "slashed" and name == "alice" for _, name, kind, _ in stage.log)


def _ground(stage: Stage) -> tuple[str, str]:
    """Level and cause of what decided."""
    told = [data for _, name, kind, data in stage.log if kind == "ruling" and name.startswith("notary")]
    last = ([ruling for ruling in told if ruling["finding"] == "wrong"] or told)[-1:]
    if last:
        return str(last[0]["level"]), str(last[0]["cause"])
    return ("segment", "re-execution") if _slashed(stage) else ("", "")


def _findings(stage: Stage) -> tuple[str, ...]:
    for name, peer in sorted(stage.peers.items()):
        if name.startswith("notary") and peer.node is not None:
            files = [hearing.file for hearing in peer.node.disputes.arbiter.hearings.values()]
            return tuple(sorted(file.kept.ended for file in files))
    return ("slash",) if _slashed(stage) else ()
