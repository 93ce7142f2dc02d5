"""The market as one peer sees it, for people: asks, offers, trades, what work costs, and what to ask or pay.

Rows of plain values with hex ids and integers, picked by a filter (market/filters.py). Reads every role, changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import msgspec

from market.ask_index import Shelf
from market.filters import ASK_KEYS, OFFER_KEYS, TRADE_KEYS, Key, pick
from market.matching import believed_ns
from market.prints import Print, power_floor, print_of, statistics, suggest_ask, suggest_limit
from market.quoting import channel_micro, quote
from market.waiting import Supply, ladder
from peer.bidding import Bidder
from peer.challenger import Challenger
from peer.desk import Desk
from peer.settler import Settler
from protocol import params
from protocol.errors import LocalProtocolError
from protocol.house import part_of_house
from protocol.keys import peer_name
from protocol.records import ROLE_SOLVER, Agreement, Ask, Offer, amount_for

__all__ = ["MarketView"]


class _Bad(LocalProtocolError):
    """The arguments of a question do not fit."""

    code = "usage"
    exit_code = 2


class _Pick(msgspec.Struct, forbid_unknown_fields=True):
    where: str = ""
    sort: str = ""
    limit: int = 0


class _Quote(msgspec.Struct, forbid_unknown_fields=True):
    operations: int
    unit_price_max: int | None = None
    memory_bytes: int = 0
    sandbox: int = 2
    device: str = "any"
    device_memory_bytes: int = 0
    segments: int = 0  # of the job, and the operations of one: what its checks cost. 0: not known
    operations_per_segment: int = 0


class _Price(msgspec.Struct, forbid_unknown_fields=True):
    sell: bool = False
    memory_bytes: int = 0
    sandbox: int = 2
    device: str = "any"
    device_memory_bytes: int = 0
    watts: int = 0
    kwh_micro: int = 0
    with_own: bool = False


_Fields = Mapping[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class _Row:
    """A row whose fields are made when they are asked for: a filter over 100,000 asks must not name every peer."""

    subject: Any
    fields: _Fields

    def __getitem__(self, name: str) -> Any:
        return self.fields[name](self.subject)

    def filled(self) -> dict[str, Any]:
        """All of it."""
        return {name: make(self.subject) for name, make in self.fields.items()}


def _read(arguments: dict[str, Any], kind: type[Any], verb: str) -> Any:
    try:
        return msgspec.convert(arguments, kind)
    except msgspec.ValidationError as error:
        raise _Bad(f"{verb}: {error}") from None


@dataclass
class MarketView:
    """See the module docstring."""

    desk: Desk
    settler: Settler
    bidder: Bidder
    challenger: Challenger

    # --- rows ----------------------------------------------------------------------------------------------
    def book(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What this peer has heard: asks picked by a filter, and, without one, all offers too."""
        given = _read(arguments, _Pick, "book")
        fields = self._ask_fields()
        asks = [_Row(a, fields) for a in self.desk.book.live_asks(role=7, now_ns=self.desk.wall_ns)]
        answer, _ = self._picked("asks", asks, ASK_KEYS, given)
        return answer | ({"offers": []} if given.where else self.offers({"limit": given.limit}))

    def offers(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The offers heard, picked by a filter, each with its bids and why this peer does not bid."""
        given = _read(arguments, _Pick, "offers")
        fields = self._offer_fields()
        rows = [_Row(pair, fields) for pair in sorted(self.desk.book.offers.items())]
        return self._picked("offers", rows, OFFER_KEYS, given)[0]

    def trades(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The prints picked by a filter, newest first, and what all of those picked say of the price."""
        given = _read(arguments, _Pick, "trades")
        fields = self._trade_fields()
        rows = [_Row(one, fields) for one in sorted(self.prints(), key=lambda p: (-p.time_ns, p.agreement))]
        answer, passed = self._picked("trades", rows, TRADE_KEYS, given)
        found = statistics((row.subject for row in passed), now_ns=self.desk.wall_ns)
        return answer | {"statistics": {**asdict(found), "enough": found.enough}}

    def _picked(
        self, name: str, rows: list[_Row], keys: Mapping[str, Key], given: _Pick
    ) -> tuple[dict[str, Any], list[_Row]]:
        """The answer, and all rows that passed, of which it shows the first."""
        passed = pick(rows, keys, where=given.where, sort=given.sort)
        limit = min(given.limit if given.limit > 0 else params.ROWS_SHOWN_MAX, params.ROWS_SHOWN_MAX)
        shown = [row.filled() for row in passed[:limit]]
        return {name: shown, f"{name}_matching": len(passed), f"{name}_heard": len(rows)}, passed

    def _ask_fields(self) -> _Fields:
        desk, settler, speed_of = self.desk, self.settler, self.challenger.speed_of
        plain = (
            "roles", "unit_price", "memory_bytes", "device", "device_memory_bytes", "sandbox", "operations_per_second",
        )  # fmt: skip
        return {
            "peer": lambda a: peer_name(a.peer),
            **{name: attrgetter(name) for name in plain},
            "proven": lambda a: asdict(speed_of(a.peer)),
            "proven_grade": lambda a: speed_of(a.peer).grade,
            "stake_micro": lambda a: settler.free_stake(a.peer),
            "trust_ppm": lambda a: settler.reputation(a.peer).bound_ppm,
            "connected": lambda a: a.peer in desk.peers or a.peer == desk.me,
            "age_ns": lambda a: max(0, desk.wall_ns - a.created_ns),
        }

    def _offer_fields(self) -> _Fields:
        desk, refusals = self.desk, self.bidder.refusals
        plain = (
            "mode", "operations", "unit_price_max", "budget_micro", "memory_bytes", "device", "device_memory_bytes",
            "sandbox", "privacy", "deadline_ns", "lock_micro", "content_bytes", "checkpoint_bytes",
        )  # fmt: skip

        def of_offer(name: str) -> Callable[[tuple[bytes, Offer]], Any]:
            return lambda pair: getattr(pair[1], name)

        def bids(pair: tuple[bytes, Offer]) -> list[dict[str, Any]]:
            live = desk.book.live_bids(pair[0], now_ns=desk.wall_ns)
            return [{"solver": peer_name(b.solver), "unit_price": b.unit_price, "eta_ns": b.eta_ns} for _, b in live]

        return {
            "offer": lambda pair: pair[0].hex(),
            "submitter": lambda pair: peer_name(pair[1].submitter),
            **{name: of_offer(name) for name in plain},
            "bids": bids,
            "bid_count": lambda pair: len(desk.book.live_bids(pair[0], now_ns=desk.wall_ns)),
            "no_bid": lambda pair: asdict(refusals[pair[0]]) if pair[0] in refusals else None,
            "no_bid_code": lambda pair: refusals[pair[0]].code if pair[0] in refusals else "none",
            "age_ns": lambda pair: max(0, desk.wall_ns - pair[1].created_ns),
            "left_ns": lambda pair: (
                max(0, pair[1].deadline_ns - desk.wall_ns) if pair[1].deadline_ns else params.FOREVER_NS
            ),
        }

    def _trade_fields(self) -> _Fields:
        desk = self.desk
        return {
            "agreement": lambda one: one.agreement.hex(),
            "time_ns": attrgetter("time_ns"),
            "age_ns": lambda one: max(0, desk.wall_ns - one.time_ns),
            "submitter": lambda one: peer_name(one.submitter),
            "solver": lambda one: peer_name(one.solver),
            "mode": attrgetter("mode"),
            "operations": attrgetter("operations"),
            "unit_price": attrgetter("unit_price"),
            "price_micro": attrgetter("price_micro"),
            "mine": lambda one: desk.me in (one.submitter, one.solver),
        }

    def prints(self) -> list[Print]:
        """All trades of the settlement log; what the house pays newcomers is none."""
        terms = ((agreement_id, channel.agreement) for agreement_id, channel in self.settler.channels.items())
        return [print_of(i, agreement) for i, agreement in terms if not part_of_house(agreement, self.desk.network)]

    # --- what it costs -------------------------------------------------------------------------------------
    def quote(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Price and speed of a job of `operations` from the asks heard, and price against waiting: `rungs`."""
        given = _read(arguments, _Quote, "quote")
        rules, book, now = self.desk.network.rules, self.desk.book, self.desk.wall_ns
        able = self._able(given)
        made = quote(able, operations=given.operations, unit_price_max=given.unit_price_max)
        busy = self.busy()
        rivals = (o for o in book.offers.values() if o.mode in ("exact", "tolerant"))
        rungs = ladder(
            [self._supply(a, busy) for a in able.cheapest(params.QUOTE_ASKS_MAX)],
            operations=given.operations,
            limit=given.unit_price_max,
            rivals=[o.unit_price_max for o in self.bidder.pricer.funded(rivals)],
            prints=[one for one in self.prints() if one.mode != "unchecked"],
            now_ns=now,
            round_ns=rules.round_ms * 10**6,
            cost=lambda price: self._cost(given, price),
        )
        return {
            **asdict(made),
            "operations": given.operations,
            "round_ms": rules.round_ms,
            "checks_included": bool(given.segments),
            "rungs": [asdict(rung) for rung in rungs],
        }

    def _able(self, given: _Quote | _Price) -> Shelf:
        """The asks of other solvers that have the memory and the sandbox."""
        return self.desk.book.asks.shelf(
            role=ROLE_SOLVER,
            now_ns=self.desk.wall_ns,
            memory_bytes=given.memory_bytes,
            sandbox=given.sandbox,
            device=given.device,
            device_memory_bytes=given.device_memory_bytes,
            without=(self.desk.me,),
        )

    def _cost(self, given: _Quote, unit_price: int) -> tuple[int, int]:
        """The work alone, and the most that it costs with its checks, where its segments are known."""
        work = amount_for(given.operations, unit_price)
        if not given.segments:
            return work, work
        rules = self.desk.network.rules
        return work, channel_micro(
            rules,
            operations=given.operations,
            segments=given.segments,
            unit_price=unit_price,
            operations_per_segment=given.operations_per_segment,
            permille=rules.newcomer_permille,
        )

    def busy(self) -> dict[bytes, Agreement]:
        """The solvers with an open channel, and the last of them: they work on it, or wait for its checks."""
        open_now = [c.agreement for c in self.settler.channels.values() if not c.closed]
        return {terms.solver: terms for terms in sorted(open_now, key=lambda terms: terms.created_ns)}

    def _supply(self, a: Ask, busy: Mapping[bytes, Agreement]) -> Supply:
        proven, work = self.challenger.speed_of(a.peer), busy.get(a.peer)
        left_ns = 0
        if work is not None:
            takes_ns = believed_ns(work.operations, work.operations * 10**9 // max(1, a.operations_per_second), proven)
            left_ns = max(0, work.created_ns + takes_ns - self.desk.wall_ns)
        return Supply(a, work is not None, left_ns, a.peer in self.desk.peers, proven)

    # --- what to ask, what to pay --------------------------------------------------------------------------
    def price(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A limit for a submitter, or with `sell` an ask for a solver, and what it rests on."""
        given, now = _read(arguments, _Price, "price"), self.desk.wall_ns
        if given.watts < 0 or given.kwh_micro < 0:
            raise _Bad("price: watts and the price of a kilowatt-hour are not negative")
        own = () if given.with_own else (self.desk.me,)
        found = statistics(self.prints(), now_ns=now, without=own, within_ns=params.PRINTS_AGE_NS)
        able = self._able(given).unit_prices.tolist()
        speed = self.bidder.speed()
        power = bool(given.watts and given.kwh_micro)
        floor = power_floor(watts=given.watts, kwh_micro=given.kwh_micro, operations_per_second=speed)
        made = suggest_ask(found, able, floor=floor) if given.sell else suggest_limit(found, able)
        return {
            "side": "sell" if given.sell else "buy",
            **asdict(made),
            "floor": floor if given.sell and power else None,
            "own_unit_price": self.desk.means.unit_price,
            "operations_per_second": speed,
            "asks": len(able),
            "within_ns": params.PRINTS_AGE_NS,
            "prints_min": params.PRINTS_MIN,
            "pairs_min": params.PRINT_PAIRS_MIN,
            "newest_age_ns": max(0, now - found.newest_ns),
            "statistics": {**asdict(found), "enough": found.enough},
        }
