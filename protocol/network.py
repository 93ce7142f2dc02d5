"""The network file: who holds what at the start, and the rules everybody applies. Refused if it cannot be fair.

The network id is the hash of everything but the bootstrap addresses, so two peers that differ in one rule are on
two networks and refuse each other's records by name instead of by accident.
"""

from __future__ import annotations

import json
import tomllib
from functools import cached_property
from typing import Annotated, Any, TypeVar

import msgspec

from protocol import params
from protocol.codec import blake, encode
from protocol.errors import IchibaError, RemoteProtocolError, VerificationFailed
from protocol.incentives import margins, stake_per_price
from protocol.keys import peer_key, peer_name

__all__ = ["BadNetworkFile", "Deposit", "House", "Network", "Reruns", "Rules", "dump", "load", "load_trusted"]

Millis = Annotated[int, msgspec.Meta(ge=1, le=30 * 24 * 3600 * 1000)]
Permille = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Micro = Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)]

_Table = TypeVar("_Table", bound=msgspec.Struct)


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

    check_permille: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50  # least share of segments that are re-executed
    newcomer_permille: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 200  # that share below 10 valid deals in a row
    check_segments_min: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # of every deal, however short
    audit_permille: Permille = 500  # how often a whistleblower re-checks the verifier
    wrong_quorum: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2  # distinct checkers before a stake is slashed
    gain_permille: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 500  # of the price: what one false segment may gain
    lock_margin_permille: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 2_000  # stake locked, of the least needed
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
    challenge_ms: Millis = 60_000  # after a right verdict the solver's lock stays: time for a whistleblower
    dispute_replay_ms: Millis = 600_000  # a player's first move: it re-executes the segment
    dispute_move_ms: Millis = 60_000  # every other move: one step, or less
    dispute_block: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 512  # multiply-adds that are left to the referee
    forced_ppm: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 2_000  # deals in which an error is ordered
    jackpot_permille: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 2_000  # of the deal's price / forced_ppm
    pool_permille: Permille = 100  # of a solver's pay, into the pool that jackpots come from
    tolerant_quorum: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3  # jurors of one word, on work that has no game


class House(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """The peer that pays who stands ready, as long as a challenge proves it (protocol/house.py). In micro-credits.

    daily_micro: the most it pays in a day (UTC), to all. availability_micro_per_hour: for each tera-operation a second
    that a card proves, once an hour.
    """

    peer: str
    daily_micro: Micro
    availability_micro_per_hour: Micro


class Reruns(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What the house pays newcomers for running its own finished work on (peer/reruns.py). In micro-credits.

    daily_micro: the most it pays in a day (UTC), to all. peer_daily_micro: to one peer. unit_price: the most it pays
    for a giga-operation; who asks less is paid what it asks.
    """

    daily_micro: Micro
    peer_daily_micro: Micro
    unit_price: Annotated[int, msgspec.Meta(ge=1, le=params.AMOUNT_MICRO_MAX)]


class Network(msgspec.Struct, frozen=True, dict=True):
    """A loaded network file. `id` is 32 bytes; `bootstrap` holds multiaddrs and is not part of the id.

    house: who pays newcomers, if anybody does: for availability, and where reruns are named for those too. notaries:
    peers that arbitrate and give randomness, none or 3f + 1 of them; with none a quorum of checkers judges.
    """

    name: str
    rules: Rules
    deposits: tuple[Deposit, ...]
    bootstrap: tuple[str, ...] = ()
    notaries: tuple[str, ...] = ()
    house: House | None = None
    reruns: Reruns | None = None

    @property
    def id(self) -> bytes:
        """BLAKE2b-256 of name, rules, deposits, notaries and, where they are named, the house and its re-runs."""
        named = (self.name, self.rules, self.deposits, self.notaries)
        assert self.reruns is None or self.house is not None, "it is the house that pays for them"
        paying = tuple(part for part in (self.house, self.reruns) if part is not None)
        return blake("ichiba/network", encode((*named, *paying)))

    @cached_property
    def house_key(self) -> bytes:
        """The house's key; empty where there is none."""
        return peer_key(self.house.peer) if self.house is not None else b""

    @cached_property
    def notary_keys(self) -> frozenset[bytes]:
        """The 32-byte keys of the notaries."""
        return frozenset(map(peer_key, self.notaries))

    @property
    def notary_quorum(self) -> int:
        """2f + 1 of 3f + 1 notaries: so many of one word decide, whatever f of them do. 0 without notaries."""
        return len(self.notaries) - (len(self.notaries) - 1) // 3 if self.notaries else 0

    def impartial(self, *parties: bytes) -> tuple[bytes, ...]:
        """The notaries that are none of these peers, by key: who decides where they are parties. Empty where they are
        too few for a quorum."""
        able = tuple(sorted(self.notary_keys - set(parties)))
        return able if self.notaries and len(able) >= self.notary_quorum else ()


def load(text: str) -> Network:
    """Parse and check a network file. Raises BadNetworkFile saying which line of thought failed."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadNetworkFile(f"the network file is not TOML: {error}") from None
    unknown = set(raw) - {"name", "rules", "deposits", "bootstrap", "notaries", "house", "reruns"}
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
        notaries = msgspec.convert(raw.get("notaries", []), tuple[str, ...])
        house = _table(raw["house"], House, "house") if "house" in raw else None
        reruns = _table(raw["reruns"], Reruns, "reruns") if "reruns" in raw else None
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        raise BadNetworkFile(f"the network file does not fit: {error}") from None
    seen = [peer_key(d.peer) for d in deposits]
    if len(set(seen)) != len(seen):
        raise BadNetworkFile("a peer has two deposits")
    if len({peer_key(notary) for notary in notaries}) != len(notaries) or len(notaries) > params.NOTARIES_MAX:
        raise BadNetworkFile(f"{len(notaries)} notaries, of which two are one, or more than {params.NOTARIES_MAX}")
    if notaries and len(notaries) % 3 != 1:
        raise BadNetworkFile(
            f"{len(notaries)} notaries",
            why="3f + 1 of them bear f that lie or are down",
            next_step="name 1, 4, 7 or 10, or none",
        )
    if house is not None and peer_key(house.peer) not in seen:
        raise BadNetworkFile("the house has no deposit to pay from", next_step="give it one, or name no house")
    if reruns is not None and house is None:
        raise BadNetworkFile("[reruns] without a [house]", why="it is the house that pays for them")
    check_incentives(rules)
    return Network(
        name=name, rules=rules, deposits=deposits, bootstrap=bootstrap, notaries=notaries, house=house, reruns=reruns
    )


def load_trusted(text: str, network_id: bytes, *, what: str) -> Network:
    """The network that a file of evidence brings, which must be the one its reader trusts (id, 32 bytes). what: is on
    it, in words. Raises RemoteProtocolError, mostly VerificationFailed."""
    try:
        network = load(text)
    except RemoteProtocolError:
        raise
    except IchibaError as error:
        raise VerificationFailed(f"the network file in it is none: {error.what}") from None
    if network.id != network_id:
        raise VerificationFailed(
            f"{what} on network {network.id.hex()[:12]}", why=f"{network_id.hex()[:12]} is the one you trust"
        )
    return network


def _table(given: Any, kind: type[_Table], name: str) -> _Table:
    """A table whose fields must all be given. Raises BadNetworkFile, and what msgspec raises."""
    names = [f.name for f in msgspec.structs.fields(kind)]
    if not isinstance(given, dict) or set(given) != set(names):
        raise BadNetworkFile(f"[{name}] takes {', '.join(names)}, all of them", next_step="see docs/protocol.md")
    return msgspec.convert([given[field] for field in names], kind)


def check_incentives(rules: Rules) -> None:
    """Refuse rules under which faking work, or a signature without a check, pays. Source: DESIGN §8.

    The inequalities are those of protocol/incentives.py, with margins of at least 1; the default rules keep 2. Raises
    BadNetworkFile, which names the rule and the value to set.
    """
    if rules.newcomer_permille < rules.check_permille:
        raise BadNetworkFile(
            f"newcomer_permille {rules.newcomer_permille} is below check_permille {rules.check_permille}",
            why="who has proved nothing must be checked at least as much as who has",
            next_step=f"set newcomer_permille to at least {rules.check_permille}",
        )
    needed = stake_per_price(rules, rules.check_permille)
    if rules.lock_margin_permille <= 1000:
        raise BadNetworkFile(
            f"lock_margin_permille {rules.lock_margin_permille} lets a cheat win at check_permille "
            f"{rules.check_permille} and gain_permille {rules.gain_permille}",
            why=f"the stake must exceed {float(needed):.2f} times the price of the work",
            next_step="set lock_margin_permille above 1000, better to 2000",
        )
    found = margins(rules)
    for name in ("honest, newcomer", "honest, good standing"):
        if found[name] < 1:
            raise BadNetworkFile(
                f"lock_margin_permille {rules.lock_margin_permille} takes more of an honest solver than it earns",
                why=f"with {params.FALSE_POSITIVES_ASSUMED_PPM} false positives in a million deals it bears "
                f"{float(found[name]):.2f} of them",
                next_step="lower lock_margin_permille or gain_permille, or raise check_permille",
            )
    if found.get("verifier", 1) < 1:
        raise BadNetworkFile(
            f"jackpot_permille {rules.jackpot_permille} lets a verifier win by signing what it did not check",
            why="forced_ppm times the jackpot is below what the check costs",
            next_step="set jackpot_permille to at least 1000, better to 2000, or forced_ppm to 0",
        )
    if found.get("pool", 1) * found.get("verifier", 1) < 1:
        raise BadNetworkFile(
            f"pool_permille {rules.pool_permille} does not fill the pool as fast as jackpots empty it",
            why=f"checks of {rules.check_permille} permille of the work must be outweighed by jackpots",
            next_step=f"set pool_permille to at least {rules.check_permille}, better to twice that",
        )


def dump(network: Network) -> str:
    """The network as TOML text that `load` reads back to the same id."""
    lines = [f"name = {json.dumps(network.name)}", f"bootstrap = {json.dumps(list(network.bootstrap))}"]
    lines += [f"notaries = {json.dumps(list(network.notaries))}", "", "[rules]"]
    lines += [f"{f.name} = {getattr(network.rules, f.name)}" for f in msgspec.structs.fields(Rules)]
    if network.house is not None:
        lines += ["", "[house]", f'peer = "{network.house.peer}"', f"daily_micro = {network.house.daily_micro}"]
        lines += [f"availability_micro_per_hour = {network.house.availability_micro_per_hour}"]
    if network.reruns is not None:
        lines += ["", "[reruns]", *(f"{n} = {getattr(network.reruns, n)}" for n in Reruns.__struct_fields__)]
    for deposit in network.deposits:
        assert peer_name(peer_key(deposit.peer)) == deposit.peer
        lines += ["", "[[deposits]]", f'peer = "{deposit.peer}"', f"free_micro = {deposit.free_micro}"]
        lines += [f"stake_micro = {deposit.stake_micro}"]
    return "\n".join(lines) + "\n"
