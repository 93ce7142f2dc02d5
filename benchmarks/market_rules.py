"""Three ways to match in one world: the market's own rules, and the two that they have to beat.

`Market` calls the very functions that peers call (market/rounds.py, market/matching.py, market/acceptance.py,
market/pricing.py), at the moments peers call them. The baselines ask floors and take what comes: `OldestFeasible` the
offer that has waited longest, `ContinuousBestPrice` the cheapest ask at once. News is as late for all of them.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from benchmarks.market_world import GIGABYTE, UNIT_OPERATIONS, Job, World
from market.acceptance import Proposal, choose
from market.matching import Proven
from market.pricing import clearing_price, next_price, rounds_until_next
from market.reputation import Reputation
from market.rounds import Candidate, match_offers
from protocol import params
from protocol.codec import blake
from protocol.network import Rules
from protocol.records import Bid, Offer, amount_for

__all__ = ["ContinuousBestPrice", "Market", "OldestFeasible"]

ROUND_S = Rules().round_ms / 1000
WINDOW_S = min(ROUND_S, Rules().proposal_ms / 4000)  # as peer/acceptance.py has it
SECOND = 10**9
NEEDS = [size * GIGABYTE for size in (4, 12, 24)]
START_NS = 1_700_000_000 * SECOND
NOTHING = bytes(32)
SPEED = 10**9  # operations a second of a machine of speed 1


def key_of(number: int) -> bytes:
    """A peer's key, from which its number is read back."""
    return number.to_bytes(32, "big")


@dataclass
class _Open:
    """A job on the market: its offer, and the bids its submitter has heard."""

    job: Job
    offer_id: bytes
    offer: Offer
    due: float  # its next round
    bids: dict[int, tuple[bytes, Bid]] = field(default_factory=dict)  # by solver


class Market:
    """The market's own rules. prices: of the solvers, from an earlier session."""

    def __init__(self, world: World, *, prices: npt.NDArray[np.int64] | None = None) -> None:
        self.world = world
        m = world.setting.solvers
        self.prices = world.floor.copy() if prices is None else prices.copy()
        self.told = self.prices.copy()  # as their asks say
        self.told_at = np.zeros(m)
        self.since = np.zeros(m)
        self.bid_on: list[dict[int, float]] = [{} for _ in range(m)]  # solver -> jobs it bid on since it was free
        self.waiting: list[dict[int, tuple[Job, Proposal]]] = [{} for _ in range(m)]
        self.windows = np.zeros(m, int)  # how many each solver has opened
        self.taken = np.zeros(m, bool)  # a slot that is signed away, before the opening is known
        self.order: npt.NDArray[np.int64] | None = None  # of `standing`, in columns
        self.limits = np.array([job.limit for job in world.jobs])
        self.needs = np.array([job.memory_bytes for job in world.jobs])
        self.arrived = np.array([job.arrives for job in world.jobs])
        self.submitters = np.array([job.submitter for job in world.jobs])
        self.gone_at = np.full(len(world.jobs), np.inf)
        self.open: dict[int, _Open] = {}
        self.of: list[list[_Open]] = [[] for _ in range(world.setting.submitters)]
        self.standing: list[tuple[int, int, int]] = []  # (-limit, memory, job), best first
        self.gone: dict[int, tuple[float, int]] = {}  # job -> when it was taken, by whom: news is late
        world.on_free = self._freed
        for job in world.jobs:
            world.at(job.arrives, self._offer, job)
        for solver in range(m):
            world.at(float(world.rng.uniform(0, ROUND_S)), self._round, solver, 0.0)

    # --- solvers -----------------------------------------------------------------------------------------
    def _now_ns(self) -> int:
        return START_NS + int(self.world.now * SECOND)

    def _round(self, solver: int, since: float) -> None:
        """A solver's move of its price, and a look at all offers by the new one (peer/pricing.py). since: when its slot
        was last taken or freed, or this chain of moves is over."""
        world = self.world
        if since != self.since[solver]:
            return
        idle = 0 if self.taken[solver] else int((world.now - since) / ROUND_S) + 1
        world.at(ROUND_S * rounds_until_next(idle), self._round, solver, since)
        left, best = self.left(solver)
        price = int(self.prices[solver])
        floor = int(world.floor[solver])
        new = next_price(price, floor=floor, left=left, best=best, idle_rounds=idle)
        self.prices[solver] = new
        told, later = int(self.told[solver]), (world.now - self.told_at[solver]) * SECOND
        if later >= params.PRICE_TELL_NS and abs(new - told) * params.PRICE_TELL_SHARE >= told:
            self._tell(solver)
        if idle and new < price:
            self._look(solver)

    def _tell(self, solver: int) -> None:
        self.told[solver], self.told_at[solver] = self.prices[solver], self.world.now

    def _changed(self, solver: int) -> None:
        """Its slot is taken, or free: the price moves at once."""
        self.since[solver] = self.world.now
        self._round(solver, self.world.now)

    def _seen(self, solver: int, job: Job) -> bool:
        """Whether the offer of a job stands in this solver's book."""
        world, after = self.world, self.world.to_submitter(solver, job.submitter)
        if world.now < job.arrives + after:
            return False
        gone = self.gone.get(job.index)
        return gone is None or (gone[1] != solver and world.now < gone[0] + after)

    def left(self, solver: int) -> tuple[int, int]:
        """As market.pricing.goes_without, over columns: the same for each need that this solver can serve; and the best
        limit that it could."""
        world = self.world
        free = self.seen_free(solver)
        limits, needs = self.wanted(solver)
        large = needs > world.memory[solver]
        kept = ~large | (np.cumsum(large) <= np.count_nonzero(free & (world.memory > world.memory[solver])))
        limits, needs = limits[kept], needs[kept]
        left, best = 0, int(limits[needs <= world.memory[solver]].max(initial=0))
        for need in NEEDS if limits.size else ():
            if need <= world.memory[solver] and bool((needs == need).any()):
                asks = np.sort(self.told[free & (world.memory >= need)])
                left = max(left, int(clearing_price(limits[needs >= need], asks)))  # type: ignore[arg-type]
        return left, best

    def seen_free(self, solver: int) -> npt.NDArray[np.bool_]:
        """Which other solvers are free, as far as this one has heard."""
        world = self.world
        busy = world.opened > world.freed
        heard = np.maximum(world.opened, world.freed) + world.between_solvers(solver) <= world.now
        free: npt.NDArray[np.bool_] = np.where(heard, ~busy, busy)
        free[solver] = False
        return free

    def wanted(self, solver: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Limits and needs of the offers that stand in this solver's book, highest limit first."""
        if self.order is None:
            self.order = np.array([index for _, _, index in self.standing], int)
        order, now = self.order, self.world.now
        late = self.world.gossip[self.submitters[order], self.world.setting.submitters + solver]
        seen = order[(self.arrived[order] + late <= now) & (now < self.gone_at[order] + late)]
        return self.limits[seen], self.needs[seen]

    def _look(self, solver: int) -> None:
        """Bid on what stands and was refused before."""
        floor = int(self.prices[solver])
        for limit, _, index in self.standing:
            if -limit < floor:
                return
            self._consider(solver, self.world.jobs[index])

    def _consider(self, solver: int, job: Job) -> None:
        """Bid on an offer, if it may be and was not done yet."""
        world, price = self.world, int(self.prices[solver])
        if self.taken[solver] or job.index in self.bid_on[solver] or job.limit < price:
            return
        if job.memory_bytes > world.memory[solver] or not self._seen(solver, job) or job.index not in self.open:
            return
        self.bid_on[solver][job.index] = world.now
        now = self._now_ns()
        operations = job.units * UNIT_OPERATIONS
        bid = Bid(
            network=NOTHING, offer=self.open[job.index].offer_id, solver=key_of(solver), unit_price=price,
            operations_cap=operations, lock_micro=0, eta_ns=int(world.takes(job, solver) * SECOND), sandbox=4,
            seed_commitment=NOTHING, forced_commitment=NOTHING, nonce=now, created_ns=now, expires_ns=now + 10**15,
        )  # fmt: skip
        bid_id = blake("bid", key_of(solver), job.index.to_bytes(4, "big"), now.to_bytes(8, "big"))
        world.at(world.tick() + world.to_submitter(solver, job.submitter), self._bid, solver, job, bid_id, bid)

    def _freed(self, solver: int) -> None:
        self.taken[solver] = False
        self.bid_on[solver].clear()
        self._changed(solver)
        self._tell(solver)
        self.world.at(self.world.tick(), self._look, solver)

    def _proposed(self, solver: int, job: Job, bid: Bid) -> None:
        """A proposal has come: it waits for about a round, or not where no other can come."""
        world = self.world
        if self.taken[solver]:
            self._decline(solver, job)
            return
        offer = self.open[job.index].offer
        proposal = Proposal(
            id=key_of(job.index),
            worth_micro=amount_for(offer.operations, offer.unit_price_max),
            price_micro=amount_for(offer.operations, bid.unit_price),
            takes_ns=bid.eta_ns,
            limit=offer.unit_price_max,
            unit_price=bid.unit_price,
        )
        waiting = self.waiting[solver]
        if not waiting:
            self.windows[solver] += 1
            world.at(WINDOW_S, self._close, solver, int(self.windows[solver]))
        waiting[job.index] = (job, proposal)
        if all(i in waiting or not self._seen(solver, world.jobs[i]) for i in self.bid_on[solver]):
            self._close(solver, int(self.windows[solver]))

    def _close(self, solver: int, window: int) -> None:
        """The window is over: sign the best."""
        held = self.waiting[solver]
        if not held or window != self.windows[solver]:
            return
        self.waiting[solver] = {}
        self.taken[solver] = True
        self._changed(solver)
        signed, passed = choose([proposal for _, proposal in held.values()], slots=1)
        jobs = {proposal.id: job for job, proposal in held.values()}
        for proposal in signed:
            job = jobs[proposal.id]
            self.world.at(self._direct(job, solver), self._accepted, solver, job, proposal.unit_price)
        for proposal, _ in passed:
            self._decline(solver, jobs[proposal.id])

    def _decline(self, solver: int, job: Job) -> None:
        self.world.declines += 1
        self.world.at(self._direct(job, solver), self._declined, solver, job)

    def _direct(self, job: Job, solver: int) -> float:
        return float(self.world.direct[job.submitter, solver])

    # --- submitters --------------------------------------------------------------------------------------
    def _offer(self, job: Job) -> None:
        world, now, operations = self.world, self._now_ns(), job.units * UNIT_OPERATIONS
        offer = Offer(
            network=NOTHING, submitter=key_of(10**6 + job.submitter), nonce=job.index, task=NOTHING, program=NOTHING,
            data=NOTHING, mode="exact", first_segment=0, last_segment=job.units, operations=operations,
            memory_bytes=job.memory_bytes, checkpoint_bytes=0, sandbox=2, unit_price_max=job.limit, budget_micro=1,
            check_permille=0, lock_micro=0, created_ns=now, expires_ns=now + 10**15,
        )  # fmt: skip
        job.state = "waiting"
        one = _Open(job, blake("offer", job.index.to_bytes(4, "big")), offer, world.now + ROUND_S)
        self.open[job.index] = one
        self.of[job.submitter].append(one)
        insort(self.standing, (-job.limit, job.memory_bytes, job.index))
        self.order = None
        wait, delays = world.tick(), world.to_solvers(job.submitter)
        able = ~self.taken & (world.memory >= job.memory_bytes) & (world.floor <= job.limit)
        for solver in np.flatnonzero(able).tolist():
            world.at(wait + float(delays[solver]), self._consider, solver, job)
        world.at(ROUND_S, self._match, job.submitter)

    def _bid(self, solver: int, job: Job, bid_id: bytes, bid: Bid) -> None:
        if job.state in ("waiting", "asked"):
            self.open[job.index].bids[solver] = (bid_id, bid)

    def _match(self, submitter: int) -> None:
        """A round over the offers of this submitter that are due, and those that would be soon (peer/jobs.py)."""
        world = self.world
        waiting = [one for one in self.of[submitter] if one.job.state == "waiting"]
        if not any(one.due <= world.now for one in waiting):
            return
        mine = [one for one in waiting if one.due <= world.now + ROUND_S / 2]
        for one in mine:
            one.due = world.now + ROUND_S
        world.at(ROUND_S, self._match, submitter)
        mine = [one for one in mine if one.bids]
        candidates = [
            Candidate(one.offer_id, one.offer, list(one.bids.values()), int((world.now - one.job.arrives) / ROUND_S))
            for one in mine
        ]
        choices = match_offers(
            candidates,
            free_stake_micro=lambda _: 1,
            reputation_of=lambda peer: Reputation.known(int(world.right[int.from_bytes(peer, "big")]), 0),
            reachable=lambda _: True,
            proven=lambda peer: Proven("witnessed", int(SPEED * world.speed[int.from_bytes(peer, "big")])),
        )
        for one in mine:
            winner = choices[one.offer_id].winner
            if winner is not None:
                solver = int.from_bytes(winner.solver, "big")
                one.job.state = "asked"
                world.at(self._direct(one.job, solver), self._proposed, solver, one.job, one.bids[solver][1])

    def _declined(self, solver: int, job: Job) -> None:
        """Passed over: the offer stands, this bid is void, the next round is at once."""
        one = self.open[job.index]
        job.state, one.due = "waiting", self.world.now
        one.bids.pop(solver, None)
        self.world.at(self.world.tick(), self._match, job.submitter)

    def _accepted(self, solver: int, job: Job, price: int) -> None:
        """Both have signed: the channel opens, which others hear by gossip, and the solver begins when it does."""
        world = self.world
        job.agreed = world.now
        world.at(self._direct(job, solver), self._begin, solver, job, price)

    def _begin(self, solver: int, job: Job, price: int) -> None:
        world = self.world
        world.start(job, solver, price)
        self.gone[job.index], self.gone_at[job.index] = (world.now, solver), world.now
        for index in self.bid_on[solver]:  # who hears of the opening forgets the other bids of this solver
            other = self.open.get(index)
            if other is not None and solver in other.bids:
                later = world.to_submitter(solver, other.job.submitter)
                world.at(later, self._void, solver, other, other.bids[solver][0])
        world.at(5.0, self._forget, job)

    @staticmethod
    def _void(solver: int, one: _Open, bid_id: bytes) -> None:
        if solver in one.bids and one.bids[solver][0] == bid_id:
            del one.bids[solver]

    def _forget(self, job: Job) -> None:
        self.standing.remove((-job.limit, job.memory_bytes, job.index))
        self.order = None
        self.of[job.submitter].remove(self.open.pop(job.index))


class _Floors:
    """What both baselines share: flat prices, and a solver that takes the first who comes while it is free."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.taken = np.zeros(world.setting.solvers, bool)
        world.on_free = self._freed
        for job in world.jobs:
            world.at(job.arrives, self._offer, job)

    def _offer(self, job: Job) -> None:
        raise NotImplementedError

    def _freed(self, solver: int) -> None:
        raise NotImplementedError

    def _fits(self, solver: int, job: Job) -> bool:
        world = self.world
        return job.limit >= world.floor[solver] and job.memory_bytes <= world.memory[solver]

    def _begin(self, solver: int, job: Job) -> None:
        job.agreed = self.world.now
        self.world.start(job, solver, int(self.world.floor[solver]))

    def _direct(self, job: Job, solver: int) -> float:
        return float(self.world.direct[job.submitter, solver])


class OldestFeasible(_Floors):
    """A free solver takes the offer that has waited longest of those it can do at its floor; its submitter agrees with
    the first solver that asks."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.queue: list[Job] = []  # by age

    def _offer(self, job: Job) -> None:
        job.state = "waiting"
        self.queue.append(job)
        wait, delays = self.world.tick(), self.world.to_solvers(job.submitter)
        for solver in np.flatnonzero(~self.taken).tolist():
            if self._fits(solver, job):
                self.world.at(wait + float(delays[solver]), self._take, solver)

    def _freed(self, solver: int) -> None:
        self.taken[solver] = False
        self._take(solver)

    def _take(self, solver: int) -> None:
        """Ask for the oldest offer in sight."""
        if self.taken[solver]:
            return
        for job in self.queue:
            late = self.world.to_submitter(solver, job.submitter)
            if job.arrives + late <= self.world.now and self._fits(solver, job):
                self.taken[solver] = True
                self.world.at(self._direct(job, solver), self._asked, solver, job)
                return

    def _asked(self, solver: int, job: Job) -> None:
        if job.state == "waiting":
            job.state = "asked"
            self.queue.remove(job)
            self.world.at(self._direct(job, solver), self._begin, solver, job)
        else:
            self.world.declines += 1
            self.world.at(self._direct(job, solver), self._freed, solver)


class ContinuousBestPrice(_Floors):
    """A submitter asks the cheapest solver that it believes to be free, at once, then the next; a solver agrees with
    the first submitter that asks, and tells everyone when it is free again."""

    NEAREST = 20  # who hears of a free slot first asks first; of a thousand who hear of it only these can be in time

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.tried: dict[int, set[int]] = {}
        self.at_market: list[Job] = []

    def _offer(self, job: Job) -> None:
        job.state = "waiting"
        self.tried[job.index] = set()
        self.at_market.append(job)
        self._try(job)

    def _try(self, job: Job) -> None:
        world = self.world
        busy = world.opened > world.freed
        seen = np.maximum(world.opened, world.freed) + world.to_solvers(job.submitter) <= world.now
        able = np.where(seen, ~busy, busy) & (world.memory >= job.memory_bytes) & (world.floor <= job.limit)
        able[list(self.tried[job.index])] = False
        found = np.flatnonzero(able)
        if found.size:
            self._ask(int(found[world.floor[found].argmin()]), job)

    def _ask(self, solver: int, job: Job) -> None:
        if job.state == "waiting":
            job.state = "asked"
            self.tried[job.index].add(solver)
            self.world.at(self._direct(job, solver), self._asked, solver, job)

    def _asked(self, solver: int, job: Job) -> None:
        if self.taken[solver]:
            self.world.declines += 1
            self.world.at(self._direct(job, solver), self._declined, job)
        else:
            self.taken[solver] = True
            self.at_market.remove(job)
            self.world.at(self._direct(job, solver), self._begin, solver, job)

    def _declined(self, job: Job) -> None:
        job.state = "waiting"
        self._try(job)

    def _freed(self, solver: int) -> None:
        self.taken[solver] = False
        wait, waiting = self.world.tick(), [job for job in self.at_market if self._fits(solver, job)]
        for job in self.at_market:
            self.tried[job.index].discard(solver)
        heard = [(wait + self.world.to_submitter(solver, job.submitter), job.index, job) for job in waiting]
        for later, _, job in sorted(heard, key=lambda one: one[0] + self._direct(one[2], solver))[: self.NEAREST]:
            self.world.at(later, self._ask, solver, job)
