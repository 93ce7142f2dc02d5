"""Who judges float work when a checker and a solver disagree: a jury that nobody chose.

No referee can repeat one operation of float work and say what it must give (decisions/0009), so other machines measure
the whole segment again. Jurors are drawn by what the notaries' randomness and both seeds give after the proof, from the
stakes of the network file, which are the same to everybody and cannot be bought for the occasion.
"""

from __future__ import annotations

from itertools import islice

from protocol.keys import peer_key
from protocol.network import Network
from protocol.sampling import checker_weight, draw_weighted

__all__ = ["jury_of"]


def jury_of(random: bytes, segment: int, network: Network, *, parties: frozenset[bytes]) -> tuple[bytes, ...]:
    """The keys of the jurors of one segment, in the order in which they are asked.

    random: of the deal's draw, 32 bytes. parties: submitter, solver and challenger, who judge nothing of it; nor do
    notaries, who count. Twice the quorum and one more, for some may be away.
    """
    least = network.rules.checker_stake_min_micro
    barred = parties | network.notary_keys
    weights = {
        peer: checker_weight(deposit.stake_micro, stake_min_micro=least, carded=True)
        for deposit in network.deposits
        if (peer := peer_key(deposit.peer)) not in barred
    }
    able = {peer: weight for peer, weight in weights.items() if weight}
    drawn = draw_weighted(random, b"jury" + segment.to_bytes(8, "little"), able)
    return tuple(islice(drawn, 2 * network.rules.tolerant_quorum + 1))
