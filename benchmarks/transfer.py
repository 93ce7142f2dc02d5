"""How fast a blob moves between two peers, against plain TCP between the same two processes.

    python benchmarks/transfer.py [--megabytes 64] [--rounds 3]

Two real processes on this machine. Each round fetches the blob anew (manifest, chunks, hashing, fsync) and then
moves as many bytes over a bare trio TCP stream. The last line is one JSON object; rates are in 10^6 bytes/s, the
median of the rounds, and `ratio` is blob rate over TCP rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from peer.blobs import BlobStore
from peer.host import HostConfig, open_host

STORE_BYTES = 4 * 1024**3


def accept_everything(topic: str, author: bytes, data: bytes) -> None:
    """No gossip is sent here."""


def config(seed: bytes) -> HostConfig:
    """A loopback host of the benchmark's own network."""
    return HostConfig(seed, ["/ip4/127.0.0.1/tcp/0"], (), False, "benchmark", accept_everything)


async def serve(directory: Path, size: int) -> None:
    """Hold one blob of `size` random bytes and a bare TCP port; say where; go on until stdin closes."""
    store = BlobStore(directory, STORE_BYTES)
    blob = await store.put_bytes(os.urandom(size))
    data = store.path(blob).read_bytes()

    async def pour(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(data)

    async with open_host(config(b"s" * 32)) as host, trio.open_nursery() as nursery:
        host.serve("blob", store.serve)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, pour, listeners)
        where = {
            "address": host.addresses[0],
            "blob": blob.hex(),
            "port": listeners[0].socket.getsockname()[1],
        }
        print(json.dumps(where), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def blob_seconds(where: dict[str, str], directory: Path, size: int) -> tuple[float, float]:
    """Seconds to connect, and to have the blob whole and on disk, in a new store."""
    store = BlobStore(directory, STORE_BYTES)
    async with open_host(config(os.urandom(32))) as host:
        started = time.perf_counter()
        peer = await host.connect(where["address"])
        connected = time.perf_counter()
        path = await store.fetch(host, bytes.fromhex(where["blob"]), [peer], size_max=size)
        ended = time.perf_counter()
        assert path.stat().st_size == size
    return connected - started, ended - connected


async def tcp_seconds(port: int, size: int) -> float:
    """Seconds to receive `size` bytes over a bare trio stream."""
    started, left = time.perf_counter(), size
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        while left:
            left -= len(await stream.receive_some(256 * 1024))
    return time.perf_counter() - started


def measure(size: int, rounds: int) -> dict[str, object]:
    """The figures of one run."""
    connects, blobs, bare = [], [], []
    with tempfile.TemporaryDirectory(prefix="ichiba-transfer-") as temporary:
        command = [sys.executable, __file__, "--serve", temporary + "/served", "--bytes", str(size)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            try:
                where = json.loads(server.stdout.readline())
                for number in range(rounds):
                    connect_s, blob_s = trio.run(blob_seconds, where, Path(temporary) / str(number), size)
                    connects.append(connect_s)
                    blobs.append(size / 1e6 / blob_s)
                    bare.append(size / 1e6 / trio.run(tcp_seconds, where["port"], size))
                    print(f"round {number}: blob {blobs[-1]:.0f} MB/s, TCP {bare[-1]:.0f} MB/s", file=sys.stderr)
            finally:
                server.stdin.close()
    rate, tcp = statistics.median(blobs), statistics.median(bare)
    return {
        "schema": "ichiba/benchmark/transfer/1",
        "mb_per_s": round(rate, 1),
        "tcp_mb_per_s": round(tcp, 1),
        "ratio": round(rate / tcp, 3),
        "connect_ms": round(1000 * statistics.median(connects), 1),
        "bytes": size,
        "rounds": rounds,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def main() -> None:
    """Run the benchmark, or its serving process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve, arguments.serve, arguments.bytes)
    else:
        print(json.dumps(measure(arguments.megabytes * 1024 * 1024, arguments.rounds)))


if __name__ == "__main__":
    main()
