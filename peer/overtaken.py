"""What is left of a bid that won a round which was played in a thread, when its outcome comes back. Sans-IO.

Meanwhile bids came and went, peers left, stakes were locked, and other rounds of this peer took solvers. Whoever is not
as it was then waits for the next round, a second later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from market.matching import Proven, Scored, believed_ns, refuse_bid, transfer_ns
from peer.deals import Job
from peer.desk import Desk
from peer.settler import Settler
from protocol.records import Offer

__all__ = ["dealt", "overtaken", "taken_since"]


def dealt(jobs: Iterable[Job]) -> frozenset[bytes]:
    """The deals that jobs have now, proposed ones too."""
    return frozenset(job.deal for job in jobs if job.deal)


def taken_since(jobs: Iterable[Job], before: Collection[bytes]) -> set[bytes]:
    """The solvers who were given a job since `dealt` was asked."""
    return {job.solvers[-1] for job in jobs if job.deal and job.deal not in before and job.solvers}


def overtaken(
    desk: Desk, settler: Settler, winner: Scored, offer_id: bytes, offer: Offer, *, excluded: Collection[bytes],
    taken: Collection[bytes], proven: Callable[[bytes], Proven], stake_min_micro: int = 0,
) -> bool:  # fmt: skip
    """Whether the winner of a round can no longer have the work: its bid is gone, replaced or out of date, or would be
    refused by now, or its solver was given other work of this peer meanwhile."""
    standing = desk.book.bids.get(offer_id, {}).get(winner.solver)
    if standing is None or standing[0] != winner.bid_id or winner.solver in taken:
        return True
    bid, now_ns = standing[1], desk.wall_ns
    takes_ns = believed_ns(offer.operations, bid.eta_ns, proven(bid.solver))
    refusal = refuse_bid(
        offer,
        bid,
        free_stake_micro=settler.free_stake(bid.solver),
        excluded=excluded,
        reachable=bid.solver in desk.peers,
        stake_min_micro=stake_min_micro,
        now_ns=now_ns,
        takes_ns=takes_ns + transfer_ns(offer, desk.link_speed(bid.solver)),
        credit_micro=settler.credit.left_micro(creditor=bid.solver, debtor=desk.me),
    )
    return refusal is not None or bid.expires_ns <= now_ns
