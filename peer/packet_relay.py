"""The process that joins network namespaces: a TUN device in each, and packets between them, slowly.

Started by peer/link_namespaces.py, which tells it one JSON line on standard input: rate, delay, and for each namespace
an open descriptor and an address. It answers `{"ready": true}`, then to each line `counters` with one JSON line. It
ends when standard input does. Its devices end with it, by whatever death, for nothing but its descriptors holds them.
How packets wait is peer/packet_lines.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any, Final

from peer.link_namespaces import inside
from peer.packet_lines import PacketLines

__all__ = ["open_tun", "run"]

DEVICE: Final = b"wan0"
PREFIX: Final = "255.255.255.0"
FRAME_BYTES_MAX: Final = 10 + 65_535
BATCH: Final = 64  # frames from one device before the others have their turn
NICE: Final = -10  # the network is not slower because the processors are busy
# linux/if_tun.h, linux/sockios.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x1, 0x1000, 0x4000
OFFLOAD_CHECKSUM, OFFLOAD_TSO4 = 1, 2
SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8913, 0x8914
IFF_UP: Final = 1


def open_tun(namespace: int, host: str) -> int:
    """The descriptor, not blocking, of a new TUN device in a network namespace, up, with the address `host`.

    namespace: a descriptor of it. Large TCP segments come whole, with checksums left to whoever takes them off (it is
    the same kernel at both ends). Raises OSError where there is no /dev/net/tun, or no right to it.
    """
    with inside(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
            fcntl.ioctl(device, TUNSETOFFLOAD, OFFLOAD_CHECKSUM | OFFLOAD_TSO4)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                for request, value in ((SIOCSIFADDR, host), (SIOCSIFNETMASK, PREFIX)):
                    packed = struct.pack("16sH2x4s8x", DEVICE, socket.AF_INET, socket.inet_aton(value))
                    fcntl.ioctl(control, request, packed)
                for name in (DEVICE, b"lo"):
                    asked = struct.pack("16sH22x", name, 0)
                    _, flags = struct.unpack("16sH22x", fcntl.ioctl(control, SIOCGIFFLAGS, asked))
                    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | IFF_UP))
        except OSError:
            os.close(device)
            raise
    return device


class _Talk:
    """Standard input and output, as the parent uses them."""

    def __init__(self) -> None:
        self.open = True
        self._heard = b""

    def lines(self) -> list[bytes]:
        """The whole lines that came. At the end of input `open` is False."""
        data = os.read(0, 4096)
        self.open = bool(data)
        *found, self._heard = (self._heard + data).split(b"\n")
        return found

    def say(self, told: dict[str, Any]) -> None:
        """One JSON line; to nobody, if nobody listens any more."""
        with suppress(BrokenPipeError):
            os.write(1, json.dumps(told).encode() + b"\n")


def run(devices: list[int], lines: PacketLines, talk: _Talk) -> None:
    """Forward until the parent is gone, by `CLOCK_MONOTONIC`. devices: by port."""
    ports = {device: port for port, device in enumerate(devices)}
    refused = 0
    while talk.open:
        next_ns = lines.next_ns()
        wait_s = None if next_ns is None else max(0, next_ns - time.monotonic_ns()) / 1e9
        # select, not epoll: its time-out is in microseconds, and there are 32 devices at most.
        readable, _, _ = select.select([*devices, 0], [], [], wait_s)
        for device in readable:
            if device == 0:
                for word in talk.lines():
                    if word == b"counters":
                        spent_ns = time.process_time_ns()
                        talk.say({**lines.counters(), "refused": refused, "processor_ns": spent_ns})
                continue
            with suppress(BlockingIOError):
                for _ in range(BATCH):
                    lines.take(ports[device], os.read(device, FRAME_BYTES_MAX), time.monotonic_ns())
        for port, frame in lines.due(time.monotonic_ns()):
            try:
                os.write(devices[port], frame)
            except OSError:  # the far end has no memory, or its device is down
                refused += 1


def main() -> None:
    """Read what to join, join it, forward."""
    talk = _Talk()
    while not (told := talk.lines()):
        if not talk.open:
            return
    task, devices = json.loads(told[0]), []
    try:
        for namespace, host in task["namespaces"]:
            devices.append(open_tun(namespace, host))
            os.close(namespace)
    except OSError as error:
        talk.say({"error": f"no TUN device: {error}"})
        raise SystemExit(1) from None
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    addresses = [socket.inet_aton(host) for _, host in task["namespaces"]]
    lines = PacketLines(addresses, bits_per_second=task["bits_per_second"], delay_ns=task["delay_ns"])
    talk.say({"ready": True})
    run(devices, lines, talk)


if __name__ == "__main__":
    main()
