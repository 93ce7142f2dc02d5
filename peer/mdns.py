"""Finding peers on the local network by mDNS (RFC 6762, 6763), with the zeroconf package.

Promises: announces our addresses and reports those of others of the same network tag; its threads end with it; a
network that has no multicast costs a log line, never the daemon. Multicast answers are anybody's word: what is
found is only ever dialled with the peer id it claims, so a liar gets a failed handshake. Refuses to know links.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio
from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf, get_all_addresses

from peer.addresses import Address, parse_address
from protocol.errors import MalformedRecord
from protocol.keys import peer_name

__all__ = ["discover", "interface_addresses"]

log = logging.getLogger(__name__)
SERVICE: Final = "_ichiba._tcp.local."
LOOKUP_MS: Final = 3000  # the answer to a question on a LAN takes milliseconds; Wi-Fi may lose one or two
FOUND_MAX: Final = 256  # distinct names looked up: somebody may invent them without end


def interface_addresses() -> list[str]:
    """The IPv4 addresses of this machine, those other machines can reach first."""
    return sorted(map(str, get_all_addresses()), key=lambda text: (ipaddress.ip_address(text).is_loopback, text))


@asynccontextmanager
async def discover(own: Sequence[Address], *, tag: str, found: Callable[[Address], None]) -> AsyncIterator[bool]:
    """Announce `own` (same peer) and call `found` in this thread with each address of others. Yields whether it works.

    It works on concrete IPv4 interfaces only: an address of 127.0.0.1 is announced on loopback, which some systems
    refuse to multicast on.
    """
    token, mine = trio.lowlevel.current_trio_token(), own[0].peer
    seen: set[str] = set()

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        # Runs in zeroconf's browser thread.
        if state_change is ServiceStateChange.Removed:
            seen.discard(name)
            return
        if name in seen or len(seen) >= FOUND_MAX:
            return
        info = zeroconf.get_service_info(service_type, name, timeout=LOOKUP_MS)
        if info is not None:
            seen.add(name)
            for address in addresses_of(info, tag):
                if address.peer != mine:
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(found, address)

    def start() -> Zeroconf:
        interfaces = sorted({address.host for address in own if address.kind == "ip4"})
        zeroconf = Zeroconf(interfaces=interfaces)
        try:
            zeroconf.register_service(announcement(own, tag))
            ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
        except (OSError, Error):
            zeroconf.close()
            raise
        return zeroconf

    zeroconf = None
    try:
        zeroconf = await trio.to_thread.run_sync(start)
    except (OSError, Error, ValueError) as fault:
        log.warning("mDNS does not work here (%s: %s); use --peer ADDRESS or an invite", type(fault).__name__, fault)
    try:
        yield zeroconf is not None
    finally:
        if zeroconf is not None:
            with trio.CancelScope(shield=True):  # bounded by zeroconf: it waits a second at most for its threads
                await trio.to_thread.run_sync(zeroconf.close)


def announcement(own: Sequence[Address], tag: str) -> ServiceInfo:
    """What we say of ourselves: the tag of our network and up to four addresses, as TXT strings."""
    assert own[0].peer is not None
    name = peer_name(own[0].peer)
    texts: dict[str | bytes, str | bytes | None] = {"tag": tag}
    texts.update({f"a{i}": str(address) for i, address in enumerate(own[:4])})
    hosts = [socket.inet_aton(address.host) for address in own[:4] if address.kind == "ip4"]
    return ServiceInfo(
        SERVICE, f"{name}.{SERVICE}", port=own[0].port, addresses=hosts, properties=texts, server=f"{name}.local."
    )


def addresses_of(info: ServiceInfo, tag: str) -> list[Address]:
    """The dialable addresses in somebody's announcement; none if it is of another network or nonsense."""
    texts = info.properties
    if texts.get(b"tag") != tag.encode():
        return []
    found = []
    for i in range(4):
        text = texts.get(f"a{i}".encode())
        if text:
            try:
                address = parse_address(text.decode("ascii", "replace"))
            except MalformedRecord as fault:
                log.debug("mDNS answer refused: %s", fault)
                continue
            # Only literal addresses: a name would have us ask a resolver of the announcer's choosing.
            if address.peer is not None and address.kind in ("ip4", "ip6") and address.port:
                found.append(address)
    return found
