"""A match, written down so that anybody can make it again: the signed offer and bids, and what its submitter knew.

The bids prove themselves. What the submitter says it knew (histories, speeds, who was connected) does not: an audit
shows that the rule was followed on those figures, and names them, so that others can compare them with their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from market.matching import Choice, Proven, Refusal, Scored, match_round
from market.reputation import Reputation
from market.rounds import Candidate
from protocol import params
from protocol.codec import Digest, PeerKey, Uint, decode
from protocol.errors import VerificationFailed
from protocol.records import Agreement, Bid, Offer, open_record

__all__ = ["Audit", "Known", "Match", "check_match", "note_match", "read_match"]


class Known(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the submitter knew of one bidder in that round. Stake in micro-credits.

    right, wrong, streak: the solver's bare history. right_ppm, wrong_ppm, deals: its Reputation on the UTC day
    `evidence_day`, which it was ranked by.
    """

    solver: PeerKey
    free_stake_micro: Uint
    right: Uint
    wrong: Uint
    streak: Uint
    grade: Literal["witnessed", "self-timed", "none"]
    operations_per_second: Uint
    reachable: bool
    excluded: bool
    taken: bool  # by another offer of the same submitter, in the same round
    right_ppm: Uint
    wrong_ppm: Uint
    deals: Uint
    evidence_day: Uint
    bytes_per_second: Uint = params.LINK_BYTES_PER_SECOND  # of the link between the two
    credit_micro: Uint = 0  # what was left of its credit line, of an offer on credit

    @property
    def proven(self) -> Proven:
        """How fast it is known to be."""
        return Proven(self.grade, self.operations_per_second)

    @property
    def reputation(self) -> Reputation:
        """What it was ranked by."""
        return Reputation(self.right_ppm, self.wrong_ppm, self.deals)


class Match(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One match: envelopes of the offer and of every bid that stood, the round, and the facts beside them."""

    network: Digest
    offer: bytes
    bids: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=params.BOOK_BIDS_PER_OFFER_MAX)]
    known: Annotated[tuple[Known, ...], msgspec.Meta(max_length=params.BOOK_BIDS_PER_OFFER_MAX)]
    round_number: Uint
    stake_min_micro: Uint
    offers: Uint  # matched together in that round
    winner: Digest  # the id of the bid
    agreement: bytes = b""  # the proposal it led to, with the signatures it has
    now_ns: Uint = 0  # when the round was


@dataclass(frozen=True)
class Audit:
    """A match made again. `winner` is what the record says, `choice` what the rule says; they agree."""

    offer_id: bytes
    offer: Offer
    choice: Choice
    winner: Scored
    offers: int


def note_match(
    candidate: Candidate,
    choice: Choice,
    envelopes: Mapping[bytes, bytes],
    *,
    offer: bytes,
    known: Sequence[Known],
    offers: int,
) -> Match:
    """What is to be kept of a round that had a winner. envelopes: of the bids, by their ids."""
    assert choice.winner is not None, "only a match is kept"
    return Match(
        network=candidate.offer.network,
        offer=offer,
        bids=tuple(envelopes[bid_id] for bid_id, _ in sorted(candidate.bids) if bid_id in envelopes),
        known=tuple(known),
        round_number=candidate.round_number,
        stake_min_micro=candidate.stake_min_micro,
        now_ns=candidate.now_ns,
        offers=offers,
        winner=choice.winner.bid_id,
    )


def read_match(data: bytes) -> Match:
    """A match from a file. Raises MalformedRecord, LimitExceeded."""
    return decode(Match, data, bytes_max=params.STORE_VALUE_BYTES_MAX)


def check_match(match: Match) -> Audit:
    """Make the match again. Raises VerificationFailed where a signature, a record or the winner is not right."""
    offer, offer_id, signers = open_record(match.offer, network=match.network)
    if not isinstance(offer, Offer) or signers != {offer.submitter}:
        raise VerificationFailed("the offer of the match is not signed by its submitter")
    bids = _bids(match, offer_id)
    known = {one.solver: one for one in match.known}
    missing = [bid.solver.hex()[:12] for _, bid in bids if bid.solver not in known]
    if missing or len(known) != len(match.known):
        raise VerificationFailed(f"no facts, or two, about the bidders {', '.join(missing) or 'of this match'}")
    choice = match_round(
        offer,
        offer_id,
        bids,
        round_number=match.round_number,
        free_stake_micro=lambda peer: known[peer].free_stake_micro,
        reputation_of=lambda peer: known[peer].reputation,
        excluded=[peer for peer, one in known.items() if one.excluded],
        reachable=lambda peer: known[peer].reachable,
        proven=lambda peer: known[peer].proven,
        link=lambda peer: known[peer].bytes_per_second,
        stake_min_micro=match.stake_min_micro,
        now_ns=match.now_ns,
        credit_micro=lambda peer: known[peer].credit_micro,
    )
    winner = next((scored for scored in choice.ranked if scored.bid_id == match.winner), None)
    if winner is None:
        why = dict(choice.refused)
        loser = next((bid.solver for bid_id, bid in bids if bid_id == match.winner), b"")
        reason = why.get(loser, Refusal("unknown", "its bid is not among those of this match"))
        raise VerificationFailed("the winner's bid could not win", why=reason.why)
    _check_winner(match, choice, winner, {peer for peer, one in known.items() if one.taken})
    _check_agreement(match, offer_id, offer, dict(bids)[winner.bid_id], winner.bid_id)
    return Audit(offer_id, offer, choice, winner, match.offers)


def _bids(match: Match, offer_id: bytes) -> list[tuple[bytes, Bid]]:
    found: dict[bytes, Bid] = {}
    for envelope in match.bids:
        bid, bid_id, signers = open_record(envelope, network=match.network)
        if not isinstance(bid, Bid) or signers != {bid.solver}:
            raise VerificationFailed("a bid of the match is not signed by its solver")
        if bid.offer != offer_id:
            raise VerificationFailed("a bid of the match is on another offer")
        found[bid_id] = bid
    return sorted(found.items())


def _check_winner(match: Match, choice: Choice, winner: Scored, taken: set[bytes]) -> None:
    """The winner is the best of those that no other offer took (market/rounds.py)."""
    left = [scored for scored in choice.ranked if scored.solver not in taken or scored == winner]
    best = left[0]
    if best != choice.ranked[0]:  # taken: if it was a newcomer that went first, the order of scores is left
        best = min(left, key=lambda scored: (scored.score_micro, scored.bid_id))
    if winner != best:
        raise VerificationFailed(
            f"the rule gives the work to {best.solver.hex()[:12]} at a score of {best.score_micro}",
            why=f"the match went to {winner.solver.hex()[:12]}, whose score is {winner.score_micro}",
        )


def _check_agreement(match: Match, offer_id: bytes, offer: Offer, bid: Bid, bid_id: bytes) -> None:
    if not match.agreement:
        return
    agreement, _, signers = open_record(match.agreement, network=match.network)
    if not isinstance(agreement, Agreement) or (agreement.offer, agreement.bid) != (offer_id, bid_id):
        raise VerificationFailed("the agreement of the match is on another offer, or with another bid")
    if offer.submitter not in signers or not signers <= {offer.submitter, bid.solver}:
        raise VerificationFailed("the agreement of the match is not signed by its submitter")
    terms = (agreement.submitter, agreement.solver, agreement.unit_price, agreement.lock_micro)
    if terms != (offer.submitter, bid.solver, bid.unit_price, bid.lock_micro):
        raise VerificationFailed("the agreement of the match has other parties, price or lock than the bid")
