"""Where packets wait between network namespaces that are far apart: rate, delay, drop-tail, by the clock it is given.

Each port has an access link of its own, as a peer at home has: a line up and a line down, so all that a peer sends
shares one rate, and all that comes for it another. A line is a token bucket with a bounded queue before it and a delay
behind it; what does not fit in the queue is dropped, and TCP finds that out by itself. Promises: nothing arrives before
its time, packets between two ports keep their order, each taken one is delivered, dropped, or on its way. Refuses to
know devices, clocks and addresses of peers (peer/packet_relay.py has them).

A frame is what a Linux TUN device with IFF_VNET_HDR gives: a virtio-net header of 10 bytes, then an IPv4 packet,
possibly one of many segments that the kernel has not cut yet (TSO). It is charged as the packets it would be cut into,
and lives or dies as a whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = ["FLIGHT_BYTES_MAX", "HEADER_BYTES", "QUEUE_BYTES_MIN", "Line", "PacketLines", "queue_bytes", "wire_bytes"]

HEADER_BYTES: Final = 10  # struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
BURST_BYTES: Final = 3000  # the bucket: two packets may leave at once after a pause
QUEUE_BYTES_MIN: Final = 128 * 1024  # two of the largest frames
FLIGHT_BYTES_MAX: Final = 256 * 1024**2  # in all lines: 32 peers at 100 Mbit/s, half a second each, and their queues
_SECOND_NS: Final = 10**9
_IPV4_BYTES: Final = 20
_TCP: Final = 6


def queue_bytes(bits_per_second: int, delay_ns: int) -> int:
    """The room before a line: what its rate sends in a round trip, as routers are told to have, and QUEUE_BYTES_MIN."""
    return max(QUEUE_BYTES_MIN, bits_per_second * 2 * delay_ns // (8 * _SECOND_NS))


def wire_bytes(frame: bytes) -> int:
    """How many bytes of IPv4 packets a frame is when cut: each segment after the first has headers of its own."""
    size = len(frame) - HEADER_BYTES
    segment = int.from_bytes(frame[4:6], "little")
    if not frame[1] or not segment or frame[HEADER_BYTES + 9] != _TCP:
        return size
    ip = (frame[HEADER_BYTES] & 15) * 4
    if len(frame) <= HEADER_BYTES + ip + 12:
        return size
    headers = ip + (frame[HEADER_BYTES + ip + 12] >> 4) * 4
    segments = max(1, -(-(size - headers) // segment))
    return size + (segments - 1) * headers


@dataclass
class Line:
    """One direction of one access link. bits_per_second: 0 for no bound. delay_ns: one way. limit_bytes: the queue.

    A bucket of `burst_bytes` is kept as the time up to which the line is paid for, so no clock has to tick.
    """

    bits_per_second: int
    delay_ns: int
    limit_bytes: int
    burst_bytes: int = BURST_BYTES
    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    queue_bytes_max: int = 0
    _paid_until_ns: int = -(2**62)

    def waiting_bytes(self, now_ns: int) -> int:
        """What is in the queue."""
        return max(0, self._paid_until_ns - now_ns) * self.bits_per_second // (8 * _SECOND_NS)

    def offer(self, size: int, now_ns: int) -> int | None:
        """When a packet of `size` bytes, offered now, comes out at the far end, in ns; None: the queue is full."""
        assert size > 0
        if not self.bits_per_second:
            self.packets, self.bytes = self.packets + 1, self.bytes + size
            return now_ns + self.delay_ns
        waiting = self.waiting_bytes(now_ns)
        if waiting and waiting + size > self.limit_bytes:
            self.dropped, self.dropped_bytes = self.dropped + 1, self.dropped_bytes + size
            return None
        self.packets, self.bytes = self.packets + 1, self.bytes + size
        self.queue_bytes_max = max(self.queue_bytes_max, waiting + size)
        oldest = now_ns - self._sending_ns(self.burst_bytes)  # tokens older than a full bucket are lost
        self._paid_until_ns = max(self._paid_until_ns, oldest) + self._sending_ns(size)
        return max(now_ns, self._paid_until_ns) + self.delay_ns

    def _sending_ns(self, size: int) -> int:
        """Rounded up: never faster than it is said to be."""
        return -(-size * 8 * _SECOND_NS // self.bits_per_second)

    def counters(self) -> dict[str, int]:
        """What went in and what was dropped."""
        told = asdict(self)
        return {name: told[name] for name in ("packets", "bytes", "dropped", "dropped_bytes", "queue_bytes_max")}


@dataclass(order=True)
class _Way:
    """A frame on its way, by the time of its next change."""

    time_ns: int
    number: int
    sent: bool = field(compare=False)  # through the line up already, and through the line down
    port: int = field(compare=False)
    frame: bytes = field(compare=False)


class PacketLines:
    """Ports 0.. with the IPv4 addresses `addresses` (4 bytes each), all with links of one rate and one delay.

    The delay lies between a line up and a line down, so it is the one-way delay between any two.
    """

    def __init__(self, addresses: Sequence[bytes], *, bits_per_second: int, delay_ns: int) -> None:
        assert len(set(addresses)) == len(addresses)
        room = queue_bytes(bits_per_second, delay_ns)
        self._ports = {address: port for port, address in enumerate(addresses)}
        self.up = [Line(bits_per_second, delay_ns, room) for _ in addresses]
        self.down = [Line(bits_per_second, 0, room) for _ in addresses]
        self.taken = self.delivered = self.unrouted = self.overflowed = self.late_ns_max = 0
        self._ways: list[_Way] = []
        self._number = self._flight_bytes = 0

    def take(self, port: int, frame: bytes, now_ns: int) -> None:
        """A frame that the namespace at `port` sent. What is no IPv4 packet to another port is counted, and gone."""
        self.taken += 1
        target = None
        if len(frame) >= HEADER_BYTES + _IPV4_BYTES and frame[HEADER_BYTES] >> 4 == 4:
            target = self._ports.get(frame[HEADER_BYTES + 16 : HEADER_BYTES + 20])
        if target is None or target == port:
            self.unrouted += 1
            return
        if self._flight_bytes + len(frame) > FLIGHT_BYTES_MAX:
            self.overflowed += 1
            return
        arrives_ns = self.up[port].offer(wire_bytes(frame), now_ns)
        if arrives_ns is not None:
            self._flight_bytes += len(frame)
            self._push(arrives_ns, target, frame, sent=False)

    def due(self, now_ns: int) -> list[tuple[int, bytes]]:
        """(port, frame) of all that has arrived by now, in order of arrival; each once."""
        found = []
        while self._ways and self._ways[0].time_ns <= now_ns:
            way = heapq.heappop(self._ways)
            if not way.sent:
                # By its own time, not by ours: that this process is late must not make a queue look shorter.
                out_ns = self.down[way.port].offer(wire_bytes(way.frame), way.time_ns)
                if out_ns is None:
                    self._flight_bytes -= len(way.frame)
                else:
                    self._push(out_ns, way.port, way.frame, sent=True)
                continue
            self._flight_bytes -= len(way.frame)
            self.delivered += 1
            self.late_ns_max = max(self.late_ns_max, now_ns - way.time_ns)
            found.append((way.port, way.frame))
        return found

    def next_ns(self) -> int | None:
        """When something happens next; None if nothing is on its way."""
        return self._ways[0].time_ns if self._ways else None

    def _push(self, time_ns: int, port: int, frame: bytes, *, sent: bool) -> None:
        self._number += 1
        heapq.heappush(self._ways, _Way(time_ns, self._number, sent, port, frame))

    @property
    def on_their_way(self) -> int:
        """Frames taken, and neither delivered nor dropped."""
        return len(self._ways)

    def counters(self) -> dict[str, Any]:
        """All that was counted: of every port's two lines, and of frames as a whole."""
        dropped = sum(line.dropped for line in (*self.up, *self.down))
        return {
            "taken": self.taken, "delivered": self.delivered, "dropped": dropped, "unrouted": self.unrouted,
            "overflowed": self.overflowed, "on_their_way": self.on_their_way, "late_ns_max": self.late_ns_max,
            "up": [line.counters() for line in self.up], "down": [line.counters() for line in self.down],
        }  # fmt: skip
