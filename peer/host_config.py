"""What a host is told when it opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peer.link_shaper import Shaper

__all__ = ["HostConfig"]


@dataclass(frozen=True)
class HostConfig:
    """What a host is told.

    seed: 32-byte Ed25519 seed. listen: multiaddrs such as /ip4/0.0.0.0/tcp/4001. topics: short names, gossiped as
    /ichiba/<network_tag>/<name>. validator(topic, author, data) raises RemoteProtocolError to reject a gossiped
    message and penalise the neighbour that passed it on; it must not block. records_in(data): how many records a
    message says it holds, which is what an author's allowance is spent on. shaper: makes its links slow.
    """

    seed: bytes
    listen: list[str]
    topics: tuple[str, ...]
    mdns: bool
    network_tag: str
    validator: Callable[[str, bytes, bytes], None]
    records_in: Callable[[bytes], int] = lambda _: 1
    shaper: Shaper | None = None
