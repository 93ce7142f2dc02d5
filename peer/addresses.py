"""Multiaddrs as text: the few forms Ichiba dials and listens on.

Promises: parsing is total (an Address or MalformedRecord with a next step) and `str(parse(x)) == x` for every
accepted text, so an address has one spelling. Refuses to resolve names or open anything.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final

from protocol.errors import MalformedRecord
from protocol.keys import peer_key, peer_name

__all__ = ["Address", "parse_address"]

ADDRESS_CHARS_MAX: Final = 400  # a host name of 253 letters and a peer id fit
DNS_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


@dataclass(frozen=True)
class Address:
    """`/kind/host/tcp/port`, with `/p2p/<id>` if it says who must answer there. `peer` is the 32-byte key."""

    kind: str
    host: str
    port: int
    peer: bytes | None = None

    def __str__(self) -> str:
        tail = "" if self.peer is None else f"/p2p/{peer_name(self.peer)}"
        return f"/{self.kind}/{self.host}/tcp/{self.port}{tail}"

    def of(self, peer: bytes) -> Address:
        """The same place, for `peer`."""
        return replace(self, peer=peer)

    @property
    def wildcard(self) -> bool:
        """Whether this listens on every interface (0.0.0.0 or ::)."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_unspecified

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_loopback


def parse_address(text: str) -> Address:
    """`text` as an Address. Raises MalformedRecord.

    Accepted: /ip4/A, /ip6/A, /dns/N, /dns4/N, /dns6/N, then /tcp/PORT, then optionally /p2p/ID.
    """
    parts = text.split("/")
    if len(text) > ADDRESS_CHARS_MAX or len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp":
        raise _no_address(text, "it is not of the form /ip4/ADDRESS/tcp/PORT/p2p/ID")
    kind, host, port = parts[1], parts[2], parts[4]
    if kind in ("ip4", "ip6"):
        try:
            number = (ipaddress.IPv4Address if kind == "ip4" else ipaddress.IPv6Address)(host)
        except ValueError as error:
            raise _no_address(text, str(error)) from None
        if str(number) != host:
            raise _no_address(text, f"write {host} as {number}")
    elif kind not in ("dns", "dns4", "dns6") or not DNS_NAME.fullmatch(host):
        raise _no_address(text, f"/{kind}/{host} is no ip4, ip6 or (lower-case) dns name")
    if not re.fullmatch(r"0|[1-9][0-9]{0,4}", port) or int(port) > 65_535:
        raise _no_address(text, f"{port} is no port")
    peer = None
    if len(parts) == 7:
        if parts[5] != "p2p":
            raise _no_address(text, f"/{parts[5]} where /p2p is expected")
        peer = peer_key(parts[6])
    return Address(kind, host, int(port), peer)


def _no_address(text: str, why: str) -> MalformedRecord:
    return MalformedRecord(
        f"{text[:120]!r} is no address", why=why, next_step="copy a whole address from the other peer's `ichiba status`"
    )
