"""What people type to pick rows of a table: 'vram>=24 price<0.3 sandbox>=namespaced role=verifier trust>0.8'.

    filter     = comparison { space comparison }          all of them must hold
    comparison = key operator value
    operator   = "<" | "<=" | "=" | "!=" | ">=" | ">"

A value is read by its key's kind: bytes (a bare number is GiB; K, M, G, T), time (seconds; ms, s, m, h, d), credits,
a count (K, M, G, T are thousands), a share (0.8 or 80%), or one word of a few. Exact integers throughout. A text that
does not parse is a BadFilter that names the place and the keys there are; nothing else is ever raised.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar

from protocol import params
from protocol.credits import micro_of
from protocol.errors import IchibaError, MalformedRecord

__all__ = ["ASK_KEYS", "OFFER_KEYS", "TRADE_KEYS", "BadFilter", "Filter", "Key", "pick", "read_filter"]


class Row(Protocol):
    """Values by the names of fields."""

    def __getitem__(self, name: str, /) -> Any:
        """The value of one field."""


_R = TypeVar("_R", bound=Row)
Kind = Literal["bytes", "time", "credits", "count", "share", "level", "roles", "word", "name", "flag"]

_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt, "<=": operator.le, "=": operator.eq, "!=": operator.ne, ">=": operator.ge, ">": operator.gt,
}  # fmt: skip
_COMPARISON: Final = re.compile(r"\s*([A-Za-z_]{1,40})\s*(<=|>=|!=|=|<|>)\s*([^\s<>=!]+)", re.ASCII)
_NUMBER: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?([A-Za-z%]{0,3})", re.ASCII)
_BINARY: Final = {"": 2**30, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TIMES: Final = {"": 10**9, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}
_SHARES: Final = {"": 10**6, "%": 10**4}
_ROLES: Final = {"solver": 1, "verifier": 2, "whistleblower": 4}
_FLAGS: Final = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_EQUAL: Final = ("=", "!=")


class BadFilter(IchibaError):
    """A filter, or a key to sort by, that means nothing; says where and what there is."""

    code = "bad-filter"
    exit_code = 2


@dataclass(frozen=True)
class Key:
    """One thing a row can be picked by: what its values are, where they stand in a row, and what it means."""

    kind: Kind
    field: str
    words: str
    choices: tuple[str, ...] = ()


ASK_KEYS: Final[dict[str, Key]] = {
    "price": Key("credits", "unit_price", "what it asks, in credits per giga-operation"),
    "memory": Key("bytes", "memory_bytes", "bytes that one job may use"),
    "vram": Key("bytes", "device_memory_bytes", "bytes on its graphics card"),
    "device": Key("word", "device", "its device", ("cpu", "gpu")),
    "speed": Key("count", "operations_per_second", "the operations a second it says"),
    "sandbox": Key("level", "sandbox", "a level, by name or number"),
    "role": Key("roles", "roles", "what it works as"),
    "stake": Key("credits", "stake_micro", "credits of stake free to lock"),
    "trust": Key("share", "trust_ppm", "pessimistic chance that it delivers, 0 to 1 or in %"),
    "card": Key("word", "proven_grade", "who timed its bench card", ("witnessed", "self-timed", "none")),
    "here": Key("flag", "connected", "whether it is connected to this peer"),
    "peer": Key("name", "peer", "a part of the peer's name"),
    "age": Key("time", "age_ns", "the time since it was said"),
}
OFFER_KEYS: Final[dict[str, Key]] = {
    "price": Key("credits", "unit_price_max", "the most it pays, in credits per giga-operation"),
    "operations": Key("count", "operations", "how many the work has"),
    "memory": Key("bytes", "memory_bytes", "bytes that it needs"),
    "vram": Key("bytes", "device_memory_bytes", "bytes that the graphics card must have"),
    "device": Key("word", "device", "the device it needs", ("any", "cpu", "gpu")),
    "sandbox": Key("level", "sandbox", "the level it needs"),
    "mode": Key("word", "mode", "the kind of work", ("exact", "tolerant", "script", "profile")),
    "lock": Key("credits", "lock_micro", "credits of stake it asks"),
    "budget": Key("credits", "budget_micro", "credits for it with its checks"),
    "privacy": Key("word", "privacy", "whether who does not win may read it", ("open", "sealed")),
    "deadline": Key("time", "left_ns", "the time left until it must be done; without one it is endless"),
    "bids": Key("count", "bid_count", "how many bids on it are heard"),
    "refused": Key("name", "no_bid_code", "why this peer does not bid: price, memory, ...; none if it does"),
    "peer": Key("name", "submitter", "a part of the submitter's name"),
    "age": Key("time", "age_ns", "the time since it was said"),
}
TRADE_KEYS: Final[dict[str, Key]] = {
    "price": Key("credits", "unit_price", "what was agreed, in credits per giga-operation"),
    "operations": Key("count", "operations", "how many the work has"),
    "total": Key("credits", "price_micro", "credits for all of it"),
    "mode": Key(
        "word", "mode", "the kind of work; unchecked: a script or a profile", ("exact", "tolerant", "unchecked")
    ),
    "submitter": Key("name", "submitter", "a part of the peer's name"),
    "solver": Key("name", "solver", "a part of the peer's name"),
    "mine": Key("flag", "mine", "whether this peer is a party"),
    "age": Key("time", "age_ns", "the time since it was agreed"),
}


@dataclass(frozen=True)
class _Test:
    key: Key
    compare: str
    value: Any

    def holds(self, row: Row) -> bool:
        found = row[self.key.field]
        if self.key.kind == "roles":
            return bool(found & self.value) == (self.compare == "=")
        if self.key.kind == "name":
            return (self.value in found.lower()) == (self.compare == "=")
        return _OPERATORS[self.compare](found, self.value)


@dataclass(frozen=True)
class Filter:
    """Comparisons that must all hold. Without any, every row passes."""

    tests: tuple[_Test, ...] = ()

    def holds(self, row: Row) -> bool:
        """Whether a row passes; it has the fields that the keys name."""
        return all(test.holds(row) for test in self.tests)


def read_filter(text: str, keys: Mapping[str, Key]) -> Filter:
    """Parse a filter over `keys`. Raises BadFilter."""
    if len(text) > params.FILTER_CHARS_MAX:
        raise BadFilter(
            f"a filter of {len(text)} characters",
            why=f"at most {params.FILTER_CHARS_MAX} are read",
            next_step=_show(keys),
        )
    tests: list[_Test] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        found = _COMPARISON.match(text, at)
        if found is None or (tests and not text[at].isspace()):
            at += len(text[at:end]) - len(text[at:end].lstrip())
            raise BadFilter(
                f"at character {at + 1} of the filter: {_cut(text[at:end])} is no comparison",
                why="a filter is KEY, then one of < <= = != >= >, then a value, and a space before the next",
                next_step=_show(keys),
            )
        name, compare, value = found.groups()
        tests.append(_test(name.lower(), compare, value, keys, at=found.start(1), value_at=found.start(3)))
        at = found.end()
    return Filter(tuple(tests))


def _test(name: str, compare: str, value: str, keys: Mapping[str, Key], *, at: int, value_at: int) -> _Test:
    key = _key(name, keys, f"at character {at + 1} of the filter: ")
    if compare not in _EQUAL and key.kind in ("roles", "word", "name", "flag"):
        raise BadFilter(
            f"at character {at + len(name) + 1} of the filter: {name!r} has no order",
            next_step=f"write {name}={value[:40]} or {name}!={value[:40]}",
        )
    try:
        return _Test(key, compare, _value(key, value))
    except (BadFilter, MalformedRecord) as error:
        raise BadFilter(
            f"at character {value_at + 1} of the filter: {error.what}",
            why=f"{name} is {key.words}",
            next_step=error.next_step or _example(name, key),
        ) from None


def _key(name: str, keys: Mapping[str, Key], place: str = "") -> Key:
    key = keys.get(name)
    if key is None:
        raise BadFilter(f"{place}no key {name[:40]!r}", why=f"the keys are {', '.join(keys)}", next_step=_show(keys))
    return key


def _value(key: Key, text: str) -> Any:
    """A value of the key's kind, as rows hold it. Raises BadFilter, MalformedRecord."""
    match key.kind:
        case "bytes":
            text = text[:-2] + text[-2] if text[-2:].lower() in ("kb", "mb", "gb", "tb") else text
            return _amount(text.removesuffix("iB").removesuffix("ib"), _BINARY)
        case "time":
            return _amount(text, _TIMES)
        case "count":
            return _amount(text, _DECIMAL)
        case "share":
            return _amount(text, _SHARES)
        case "credits":
            return micro_of(text)
        case "name":
            return text.lower()
        case "level":
            names = [level.lower() for level in params.SANDBOX_LEVELS]
            if text.lower() in names:
                return names.index(text.lower())
            return names.index(_word(names[int(text)] if text in ("0", "1", "2", "3", "4") else text, names))
        case "roles":
            return _ROLES[_word(text, list(_ROLES))]
        case "flag":
            return _FLAGS[_word(text, list(_FLAGS))]
        case "word":
            return _word(text, list(key.choices))
    raise AssertionError(key.kind)


def _word(text: str, choices: list[str]) -> str:
    if text.lower() not in choices:
        raise BadFilter(f"{_cut(text)} is none of {', '.join(choices)}")
    return text.lower()


def _amount(text: str, units: Mapping[str, int]) -> int:
    """A number with a unit as an integer of the smallest; what is finer than that is cut off."""
    found = _NUMBER.fullmatch(text)
    if found is None or found[3].lower() not in units:
        raise BadFilter(
            f"{_cut(text)} is no amount", next_step=f"write a number and one of: {' '.join(filter(None, units))}"
        )
    whole, part, unit = found[1], found[2] or "", units[found[3].lower()]
    return int(whole + part) * unit // int(10 ** len(part))


def _cut(text: str) -> str:
    return repr(text[:40])


def _example(name: str, key: Key) -> str:
    sample = {
        "bytes": ">=24G", "time": "<5m", "credits": "<0.3", "count": ">=10G", "share": ">0.8", "level": ">=namespaced",
        "roles": "=verifier", "flag": "=yes",
    }.get(key.kind, f"={key.choices[0] if key.choices else 'x'}")  # fmt: skip
    return f"write it like {name}{sample}"


def _show(keys: Mapping[str, Key]) -> str:
    return "for example " + " ".join(
        _example(name, keys[name]).removeprefix("write it like ") for name in list(keys)[:3]
    )


def pick(rows: Iterable[_R], keys: Mapping[str, Key], *, where: str = "", sort: str = "") -> list[_R]:
    """The rows that pass the filter `where`, in their order or sorted by a key, downwards with a leading "-".

    Raises BadFilter.
    """
    wanted = read_filter(where, keys)
    found = [row for row in rows if wanted.holds(row)]
    if sort:
        key = _key(sort.removeprefix("-").lower(), keys, "cannot sort: ")
        found.sort(key=lambda row: row[key.field], reverse=sort.startswith("-"))
    return found
