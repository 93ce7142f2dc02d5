"""What slow links really give: namespaces joined by a relay (peer/link_namespaces.py), beside the in-process shaper.

Run as root `python benchmarks/namespaces.py [--json] [--seconds 4]`. For each shape and each of the two ways, over one
TCP connection between two ends: round trips of one byte (median), then a stream that lasts about `--seconds`, whose
rate is that of its second half, as the receiver gets it; then two streams at once from one end, whose bytes over their
time say whether they share an uplink. Processor: of the relay for a second of the stream; of the shaper, this process
with both ends of the connection, minus the same bytes over the same connection without a shaper. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import trio

from peer.link_namespaces import LinkNamespaces
from peer.link_shaper import Shape, ShapedSocket

SHAPES = {"10 Mbps + 50 ms": (10_000_000, 50_000_000), "100 Mbps + 50 ms": (100_000_000, 50_000_000)}
PINGS = 8
PIECE = 64 * 1024


class End(Protocol):
    """One end of a connection."""

    async def send_all(self, data: bytes | memoryview) -> None: ...
    async def receive_some(self, bytes_max: int) -> bytes: ...


Pair = tuple[End, End]


async def exactly(end: End, size: int) -> None:
    """Read and forget `size` bytes."""
    while size:
        data = await end.receive_some(min(size, 1 << 20))
        assert data
        size -= len(data)


async def round_trip_ms(near: End, far: End) -> float:
    """The median over PINGS of a byte there and a byte back."""
    took = []
    for _ in range(PINGS):
        began = time.monotonic()
        await near.send_all(b"?")
        await exactly(far, 1)
        await far.send_all(b"!")
        await exactly(near, 1)
        took.append(1000 * (time.monotonic() - began))
    return statistics.median(took)


async def stream_mbps(near: End, far: End, size: int) -> float:
    """Send `size` bytes; the rate at which the second half came."""
    half = size // 2

    async def send() -> None:
        for start in range(0, size, PIECE):
            await near.send_all(bytes(min(PIECE, size - start)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await exactly(far, half)
        began = time.monotonic()
        await exactly(far, size - half)
        return 8e-6 * (size - half) / (time.monotonic() - began)


@asynccontextmanager
async def connected(near_in: Any, far_in: Any, host: str, shape: Shape | None) -> AsyncIterator[Pair]:
    """A TCP connection, its ends made in these namespaces. shape: of both ends, by the in-process shaper."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        with far_in():
            listener = trio.socket.socket()
        with near_in():
            near = trio.socket.socket()
        with listener:
            await listener.bind((host, 0))
            listener.listen(1)
            await near.connect(listener.getsockname())
            far, _ = await listener.accept()
        ends: list[Any] = []
        for end in (near, far):
            end.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
            ends.append(await stack.enter_async_context(trio.SocketStream(end)))
            if shape is not None:
                ends[-1] = ShapedSocket(ends[-1], shape, random.Random(1))
                nursery.start_soon(ends[-1].run)
                stack.push_async_callback(ends[-1].aclose)
        yield ends[0], ends[1]
        await stack.aclose()
        nursery.cancel_scope.cancel()


def own_processor_s() -> float:
    """Of this process, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(connect: Callable[[], Any], size: int, processor_s: Callable[[], float]) -> dict[str, float]:
    """All figures of one way."""
    async with connect() as (near, far), connect() as (second_near, second_far):
        ping_ms = await round_trip_ms(near, far)
        before_s, began = processor_s(), time.monotonic()
        mbps = await stream_mbps(near, far, size)
        used = (processor_s() - before_s) / (time.monotonic() - began)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream_mbps, near, far, size // 2)
            nursery.start_soon(stream_mbps, second_near, second_far, size // 2)
        both_mbps = 8e-6 * 2 * (size // 2) / (time.monotonic() - began)
    return {
        "round_trip_ms": round(ping_ms, 2), "mbps": round(mbps, 2), "two_streams_mbps": round(both_mbps, 2),
        "processor_per_second": round(used, 4),
    }  # fmt: skip


async def both_ways(rate: int, delay_ns: int, seconds: float) -> dict[str, Any]:
    """The relay, the shaper, and the same bytes over loopback as they are."""
    size = int(rate / 8 * seconds)
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        links = LinkNamespaces.open(["a", "b"], bits_per_second=rate, delay_ns=delay_ns, log=Path(place) / "relay.log")
        up_s = time.monotonic() - began
        try:
            relay = await measure(
                lambda: connected(lambda: links.entered("a"), lambda: links.entered("b"), links.host_of("b"), None),
                size,
                lambda: float(links.counters()["processor_ns"]) / 1e9,
            )
            counted = links.counters()
        finally:
            links.close()
    frames = {name: counted[name] for name in ("taken", "dropped", "overflowed", "refused")}
    here = nullcontext
    shape = Shape(delay_ns / 1e9, rate / 8)
    shaper = await measure(lambda: connected(here, here, "127.0.0.1", shape), size, own_processor_s)
    async with connected(here, here, "127.0.0.1", None) as (near, far):
        before_s = own_processor_s()
        await stream_mbps(near, far, size)
        shaper["processor_per_second"] -= (own_processor_s() - before_s) / (size * 8 / rate)
    shaper["processor_per_second"] = round(shaper["processor_per_second"], 4)
    own = {"up_seconds": round(up_s, 2), "late_ms_max": round(counted["late_ns_max"] / 1e6, 2), "frames": frames}
    queue = max(line["queue_bytes_max"] for line in (*counted["up"], *counted["down"]))
    return {"namespaces": relay | own | {"queue_bytes_max": queue}, "shaper": shaper}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each stream, at the rate that was asked for")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = {name: trio.run(both_ways, *asked, options.seconds) for name, asked in SHAPES.items()}
    for name, ways in found.items() if not options.json else ():
        for way, figures in ways.items():
            print(
                f"{name:16} {way:10} {figures['mbps']:7.2f} Mbps, two streams {figures['two_streams_mbps']:7.2f}, "
                f"round trip {figures['round_trip_ms']:6.2f} ms, "
                f"{100 * figures['processor_per_second']:5.2f} % of a processor"
            )
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    machine = {
        "processor": platform.machine(), "cores": os.cpu_count(), "kernel": platform.release(),
        "load_before": round(load, 2), "congestion_control": congestion,
    }  # fmt: skip
    print(json.dumps({"schema": "ichiba.benchmark.namespaces/1", "machine": machine, "shapes": found}))


if __name__ == "__main__":
    main()
