"""The network file: who holds what at the start, and the rules everybody applies. Refused if it cannot be fair.

The network id is the hash of everything but the bootstrap addresses, so two peers that differ in one rule are on
two networks and refuse each other's records by name instead of by accident.
"""

from __future__ import annotations

import json
import tomllib
from typing import Annotated, Any

import msgspec

from protocol import params
from protocol.codec import blake, encode
from protocol.errors import IchibaError
from protocol.keys import peer_key, peer_name

__all__ = ["BadNetworkFile", "Deposit", "Network", "Rules", "dump", "load"]

Millis = Annotated[int, msgspec.Meta(ge=1, le=30 * 24 * 3600 * 1000)]
Permille = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Micro = Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)]


class BadNetworkFile(IchibaError):
    """The network file is malformed, or its numbers let a cheat win."""

    code = "bad-network-file"
    exit_code = 2


class Deposit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer brings in at the start: spendable credits and stake, in micro-credits."""

    peer: str
    free_micro: Micro
    stake_micro: Micro


class Rules(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """The numbers of DESIGN §5, §8 and §9. Shares in permille, times in milliseconds."""

    check_permille: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 200  # segments of a deal that are re-executed
    check_segments_min: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    audit_permille: Permille = 500  # how often a whistleblower re-checks the verifier
    wrong_quorum: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2  # distinct checkers before a stake is slashed
    lock_permille: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 5000  # stake locked, of the price of the work
    round_ms: Millis = 1_000  # matching round: least price dispersion at 1 s (NOTES, market)
    checker_stake_min_micro: Micro = 1_000_000  # a verdict without a stake behind it slashes nobody
    proposal_ms: Millis = 5_000
    bid_lifetime_ms: Millis = 60_000
    ask_lifetime_ms: Millis = 600_000
    offer_lifetime_ms: Millis = 3_600_000
    segment_silence_ms: Millis = 600_000  # the longest wait for the next receipt of a live solver
    lost_grace_ms: Millis = 30_000  # after its connection is gone
    reveal_ms: Millis = 20_000
    check_silence_ms: Millis = 600_000
    settle_silence_ms: Millis = 60_000
    claim_window_ms: Millis = 120_000


class Network(msgspec.Struct, frozen=True):
    """A loaded network file. `id` is 32 bytes; `bootstrap` holds multiaddrs and is not part of the id."""

    name: str
    rules: Rules
    deposits: tuple[Deposit, ...]
    bootstrap: tuple[str, ...] = ()

    @property
    def id(self) -> bytes:
        """BLAKE2b-256 of name, rules and deposits."""
        return blake("ichiba/network", encode((self.name, self.rules, self.deposits)))


def load(text: str) -> Network:
    """Parse and check a network file. Raises BadNetworkFile saying which line of thought failed."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadNetworkFile(f"the network file is not TOML: {error}") from None
    unknown = set(raw) - {"name", "rules", "deposits", "bootstrap"}
    if unknown:
        raise BadNetworkFile(f"unknown keys {sorted(unknown)}", next_step="see docs/protocol.md")
    try:
        names = {f.name for f in msgspec.structs.fields(Rules)}
        given = raw.get("rules", {})
        if not isinstance(given, dict):
            raise BadNetworkFile("`rules` is not a table", next_step="write [rules], see docs/protocol.md")
        if not set(given) <= names:
            raise BadNetworkFile(f"unknown rules {sorted(set(given) - names)}", next_step="see docs/protocol.md")
        values = {f.name: given.get(f.name, f.default) for f in msgspec.structs.fields(Rules)}
        rules = msgspec.convert([values[f.name] for f in msgspec.structs.fields(Rules)], Rules)
        deposits = tuple(
            msgspec.convert([d.get("peer"), d.get("free_micro", 0), d.get("stake_micro", 0)], Deposit)
            for d in raw.get("deposits", [])
        )
        name = msgspec.convert(raw.get("name"), Annotated[str, msgspec.Meta(min_length=1, max_length=40)])
        bootstrap = msgspec.convert(raw.get("bootstrap", []), tuple[str, ...])
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        raise BadNetworkFile(f"the network file does not fit: {error}") from None
    seen = [peer_key(d.peer) for d in deposits]
    if len(set(seen)) != len(seen):
        raise BadNetworkFile("a peer has two deposits")
    check_incentives(rules)
    return Network(name=name, rules=rules, deposits=deposits, bootstrap=bootstrap)


def check_incentives(rules: Rules) -> None:
    """Refuse rules under which faking work pays in expectation. Source: DESIGN §8, first inequality.

    With reward R = 1, c - h <= R (faking saves at most the whole price), G = 0, a = 1 (exact mode misses nothing
    it looks at) and w = 0, the condition S > (c - h)/P - R becomes S > 1/P - 1, where P is the least chance that
    a checked deal exposes a fraud, the share of segments re-executed.
    """
    exposed = rules.check_permille / 1000
    needed = 1 / exposed - 1
    if rules.lock_permille / 1000 < needed:
        raise BadNetworkFile(
            f"lock_permille {rules.lock_permille} lets a cheat win at check_permille {rules.check_permille}",
            why=f"the stake must exceed {needed:.2f} times the price of the work",
            next_step=f"set lock_permille to at least {int(needed * 1000) + 1}",
        )


def dump(network: Network) -> str:
    """The network as TOML text that `load` reads back to the same id."""
    lines = [f"name = {json.dumps(network.name)}", f"bootstrap = {json.dumps(list(network.bootstrap))}", "", "[rules]"]
    lines += [f"{f.name} = {getattr(network.rules, f.name)}" for f in msgspec.structs.fields(Rules)]
    for deposit in network.deposits:
        assert peer_name(peer_key(deposit.peer)) == deposit.peer
        lines += ["", "[[deposits]]", f'peer = "{deposit.peer}"', f"free_micro = {deposit.free_micro}"]
        lines += [f"stake_micro = {deposit.stake_micro}"]
    return "\n".join(lines) + "\n"
