"""The signed order by which an owner moves credits into its stake, or begins to take them out. Import it from here.

An add counts as stake as soon as it is folded. A withdrawal counts no more from then on, for a lock, a check or a
challenge, but for `unbonding_ns` it still answers for what its owner signed before: docs/decisions/0020-stake-moves.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint
from protocol.network import Network

__all__ = ["StakeMove", "unbonding_ns"]

MoveMicro = Annotated[int, msgspec.Meta(ge=params.STAKE_MOVE_MICRO_MIN, le=params.AMOUNT_MICRO_MAX)]


class StakeMove(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/stake-move/1"
):
    """`add`: amount_micro of the owner's free credits become stake. `withdraw`: so much of its free stake unbonds, less
    what penalties took meanwhile that its owner did not know of. Signed by the owner.

    `sequence` is of the same series as that of the owner's openings of channels: of one number there is one order.
    lost_micro: of a withdrawal, what penalties had taken of the stake, unbonding or not, in the owner's ledger when it
    signed, so every peer can tell a stake that is not there yet from one that a penalty reached before; of an add 0.
    """

    network: Digest
    owner: PeerKey
    sequence: Uint
    kind: Literal["add", "withdraw"]
    amount_micro: MoveMicro
    created_ns: Uint
    lost_micro: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


def unbonding_ns(network: Network) -> int:
    """How long what is withdrawn still answers for its owner, in ns: the longest that an honest deal takes from the
    first word a stake stands behind to the record by which that stake is lost.

    Derived and not a rule of the file, so no network can set it shorter than its windows: after the first verdict the
    seeds and two more checks; the settlement, or the claim in its place, frozen; the time in which a closed deal may
    be challenged; in a network with notaries two disputes, for of one segment they are heard one after the other, with
    the lapse of one in them; and the clocks of two peers.
    """
    rules = network.rules
    checked_ms = rules.reveal_ms + 2 * rules.check_silence_ms
    closed_ms = rules.settle_silence_ms + max(rules.claim_window_ms, checked_ms)
    frozen_ms = params.FREEZE_WINDOWS * rules.claim_window_ms
    dispute_ms = 2 * rules.dispute_replay_ms + params.DISPUTE_ROUNDS_MAX * rules.dispute_move_ms
    judged_ms = 2 * dispute_ms if network.notaries else 0
    whole_ms = checked_ms + closed_ms + frozen_ms + rules.challenge_ms + judged_ms
    return whole_ms * 10**6 + params.CLOCK_SKEW_NS_MAX
