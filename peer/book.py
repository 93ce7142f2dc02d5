"""The address book: where peers may be found, and when to try them again.

Sans-IO: `now` is seconds of any monotonic clock. Promises: bounded; what somebody asked for (`kept`) is tried again
for ever with growing pauses and never pushed out by hearsay; hearsay is tried only when links are wanted, and is
forgotten after params.REDIALS_MAX failures. Refuses to dial.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from peer.addresses import Address
from protocol import params

__all__ = ["AddressBook"]


@dataclass
class _Entry:
    addresses: list[Address] = field(default_factory=list)  # the best first
    kept: bool = False
    failures: int = 0
    due: float = 0.0


class AddressBook:
    """Addresses by peer key. `own` is this host's key, which is never entered."""

    def __init__(self, own: bytes) -> None:
        self._own = own
        self._entries: dict[bytes, _Entry] = {}

    def learn(self, address: Address, *, now: float, kept: bool = False, wait: float = 0.0) -> None:
        """Enter an address that says who answers there; dial it `wait` seconds from now at the earliest."""
        peer = address.peer
        if peer is None or peer == self._own:
            return
        entry = self._entries.get(peer)
        if entry is None:
            if len(self._entries) >= params.KNOWN_PEERS_MAX:
                hearsay = next((other for other, known in self._entries.items() if not known.kept), None)
                if hearsay is None:
                    return
                del self._entries[hearsay]
            entry = self._entries[peer] = _Entry(due=now + wait)
        entry.kept = entry.kept or kept
        if address in entry.addresses:
            entry.addresses.remove(address)
        # What somebody asked for goes first; hearsay goes last, and is the first to leave.
        entry.addresses.insert(0 if kept else len(entry.addresses), address)
        if len(entry.addresses) > params.KNOWN_ADDRESSES_PER_PEER_MAX:
            entry.addresses.pop(-1 if kept else -2)

    def known(self, peer: bytes) -> list[Address]:
        """The addresses of `peer`, the best first."""
        entry = self._entries.get(peer)
        return list(entry.addresses) if entry else []

    def forget(self, address: Address) -> None:
        """Somebody else answers at `address`."""
        entry = self._entries.get(address.peer or b"")
        if entry and address in entry.addresses:
            entry.addresses.remove(address)
            if not entry.addresses:
                del self._entries[address.peer or b""]

    def reached(self, address: Address, *, now: float) -> None:
        """A link to `address` works: it goes first, and its pauses start anew if it is lost."""
        entry = self._entries.get(address.peer or b"")
        if entry:
            if address in entry.addresses:
                entry.addresses.remove(address)
                entry.addresses.insert(0, address)
            entry.failures, entry.due = 0, now + params.REDIAL_SECONDS_MIN

    def failed(self, peer: bytes, *, now: float) -> None:
        """No address of `peer` answers: wait longer, twice as long each time up to REDIAL_SECONDS_MAX."""
        entry = self._entries.get(peer)
        if entry:
            entry.failures += 1
            if entry.failures >= params.REDIALS_MAX and not entry.kept:
                del self._entries[peer]
                return
            pause = params.REDIAL_SECONDS_MIN * 2 ** min(entry.failures, 16)
            entry.due = now + min(pause, params.REDIAL_SECONDS_MAX)

    def due(self, *, now: float, linked: Collection[bytes]) -> list[bytes]:
        """The peers to dial now: lost ones that were asked for, then others while links are wanted."""
        waiting = [peer for peer, entry in self._entries.items() if peer not in linked and entry.due <= now]
        kept = [peer for peer in waiting if self._entries[peer].kept]
        others = [peer for peer in waiting if not self._entries[peer].kept]
        return kept + others[: max(0, params.LINKS_WANTED - len(linked) - len(kept))]

    def told(self, linked: Collection[bytes]) -> list[str]:
        """What a newcomer is told: addresses of peers we are linked to, at most PEERS_TOLD_MAX."""
        return [str(self._entries[peer].addresses[0]) for peer in linked if peer in self._entries][
            : params.PEERS_TOLD_MAX
        ]

    def __len__(self) -> int:
        return len(self._entries)
