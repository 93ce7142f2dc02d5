"""What a peer was paid, out of the settlement log: one row a closed channel and part it had in it. Sans-IO."""

from __future__ import annotations

from typing import Any

from peer.settler import Settler
from protocol.house import part_of_house

__all__ = ["earnings_of"]


def earnings_of(settler: Settler, me: bytes, *, since_ns: int = 0) -> list[dict[str, Any]]:
    """`time_ns` it was closed at, `deal`, `role` (solver, checker, available or rerun), `micro`, oldest first.

    As available the house's pay for a passed challenge, as rerun that for work it knew the end of. As solver what is
    left of the pay when the pool has its slice; as checker the fees. Jackpots and shares of slashed locks are not
    work's pay and not here: `ichiba wallet` has them.
    """
    rows: list[dict[str, Any]] = []
    for deal, channel in settler.channels.items():
        if channel.closed not in ("settled", "claimed") or channel.closed_ns < since_ns:
            continue
        kept = channel.paid_micro - channel.pool_micro(channel.paid_micro, settler.desk.network)
        part = part_of_house(channel.agreement, settler.desk.network) or "solver"
        parts = {
            part: kept if channel.agreement.solver == me else 0,
            "checker": sum(micro for peer, micro in channel.fees if peer == me),
        }
        rows += [
            {"time_ns": channel.closed_ns, "deal": deal.hex(), "role": role, "micro": micro}
            for role, micro in parts.items()
            if micro
        ]
    return sorted(rows, key=lambda row: (row["time_ns"], row["deal"], row["role"]))
