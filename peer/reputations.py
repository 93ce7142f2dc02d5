"""What the settlement log says of peers, for people, and the co-signed evidence of it in one answer. Sans-IO."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

import msgspec

from market.reputation import DAY_NS, DEAL, ROLES, Reputation, Role, Weighed
from peer.settler import Settler
from protocol import params
from protocol.errors import LocalProtocolError, NotFound
from protocol.keys import peer_key, peer_name

__all__ = ["WINDOW_OVER", "ReputationView", "figures", "reasons"]

WINDOW_OVER = b""  # among a deal's records: here the window of a one-sided closing ended, which is no record
_KEY_BYTES = 32
_WORDS = {
    "settled": "settled by both",
    "claimed": "closed by one side alone, on vouchers",
    "unpaid": "ended with nothing paid",
    "wrong": "found wrong",
    "paid": "checks paid by both",
    "condemned": "verdicts that slashed",
    "faulty": "verdicts refuted",
    "left": "left to the solver to close",
}


class _Bad(LocalProtocolError):
    """The arguments of a question do not fit."""

    code = "usage"
    exit_code = 2


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    peer: str = ""  # a name, or its unambiguous end
    role: str = ""


def figures(found: Reputation) -> dict[str, int]:
    """A reputation as plain values."""
    return {**asdict(found), "mean_ppm": found.mean_ppm, "bound_ppm": found.bound_ppm}


def reasons(found: Weighed, today: int) -> list[str]:
    """What the score comes from, in sentences: what happened, and what of it does not count in full."""
    told = [f"{count} {_WORDS[outcome]}" for outcome, count in found.outcomes.items()]
    words = [", ".join(told) if told else "no evidence: it is unknown here"]
    if found.outcomes:
        age = today - (found.since_day or 0)
        words.append(f"from {found.pairs} counterpart{'y' if found.pairs == 1 else 'ies'}, the oldest {age} days old")
    if found.washed:
        words.append(f"{found.washed} not counted: of one pair one deal a day counts")
    if found.capped_ppm:
        unbacked = found.pairs - found.backed
        words.append(
            f"{found.capped_ppm / DEAL:.2f} deals cut: one counterparty counts {params.REPUTATION_PAIR_DEALS} at most, "
            f"and the {unbacked} without a deposit count as one"
        )
    if found.faded_ppm:
        words.append(f"{found.faded_ppm / DEAL:.2f} deals faded: evidence halves in 30 days")
    if found.early:
        words.append(f"{found.early} dated after today: not counted yet")
    return words


@dataclass
class ReputationView:
    """Answers of one peer about all; it changes nothing."""

    settler: Settler

    @property
    def _today(self) -> int:
        return self.settler.desk.wall_ns // DAY_NS

    def describe(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The reputations of a peer, or of all of whom there is evidence, the best bound first. Raises NotFound."""
        given = _asked(arguments)
        known, today = self.settler.reputations, self._today
        roles: tuple[Role, ...] = tuple(role for role in ROLES if given.role in ("", role))
        peers = {self._find(given.peer)} if given.peer else {peer for role in roles for peer in known.peers(role)}
        rows: list[dict[str, Any]] = []
        for role in roles:
            for peer in sorted(peers & set(known.peers(role)) if not given.peer else peers):
                found = known.of(role, peer, today=today, viewer=self.settler.desk.me)
                told = {name: value for name, value in asdict(found).items() if name != "reputation"}
                words = reasons(found, today)
                rows.append({"peer": peer_name(peer), "role": role, **figures(found.reputation), **told, "why": words})
        rows.sort(key=lambda row: (ROLES.index(row["role"]), -row["bound_ppm"], row["peer"]))
        return {
            "day": today,
            "half_life_days": 30,
            "reputations": rows[: params.ROWS_SHOWN_MAX],
            "left_out": max(0, len(rows) - params.ROWS_SHOWN_MAX),
        }

    def export(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """All evidence of one peer (this one, if none is named) for peer/reputation_bundle.py, and what it comes to for
        somebody who has seen nothing himself."""
        given = _asked(arguments)
        peer = self._find(given.peer) if given.peer else self.settler.desk.me
        known, today = self.settler.reputations, self._today
        deals = sorted({one.deal for role in ROLES for one in known.evidence(role, peer)})
        channels = self.settler.channels
        return {
            "peer": peer_name(peer),
            "day": today,
            "claimed": {role: figures(known.of(role, peer, today=today).reputation) for role in ROLES},
            "deals": [
                [self.settler.log.get(record_id, WINDOW_OVER) for record_id in channels[deal].records] for deal in deals
            ],
        }

    def _find(self, name: str) -> bytes:
        """A peer by its name, or by its end where that is unambiguous among those heard of."""
        desk = self.settler.desk
        heard = {peer for role in ROLES for peer in self.settler.reputations.peers(role)}
        heard |= {desk.me, *desk.peers, *(ask.peer for ask in desk.book.asks)}
        found = [peer for peer in sorted(heard) if peer_name(peer).endswith(name)]
        if len(found) == 1:
            return found[0]
        if found or len(name) < _KEY_BYTES:
            raise NotFound(
                f"{len(found) or 'no'} peers end in {name[:64]!r}", next_step="`ichiba reputation` lists those known"
            )
        return peer_key(name)


def _asked(arguments: dict[str, Any]) -> _Asked:
    try:
        given = msgspec.convert(arguments, _Asked)
    except msgspec.ValidationError as error:
        raise _Bad(f"reputation: {error}") from None
    if given.role and given.role not in get_args(Role):
        raise _Bad(f"no role {given.role[:40]!r}", next_step=f"one of {', '.join(ROLES)}")
    return given
