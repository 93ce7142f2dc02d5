"""Payloads between real hosts: through Noise and the muxer, over connections that break, from processes that die."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio

from peer.link_shaper import parse_shaper
from peer.tensor_links import PROTOCOL, Seat, TensorLinks
from protocol.keys import SigningKey
from tests.swarm.conftest import Node, start_nodes, until
from tests.tensor_scene import expected, key, place

PAYLOAD_BYTES = 1 << 20

CHILD = """
import random, sys, trio
from pathlib import Path
from peer.tensor_links import PROTOCOL, Seat, TensorLinks
from tests.swarm.conftest import make_config, start_node
from tests.tensor_scene import key, place

async def main():
    async with start_node(make_config(seed=bytes.fromhex(sys.argv[1]))) as node, trio.open_nursery() as nursery:
        peer = await node.host.connect(sys.argv[2])
        links = TensorLinks(node.host, Path(sys.argv[3]), nursery)
        node.host.serve(PROTOCOL, links.serve)
        with links.open(place(0, to={1}, epoch=int(sys.argv[4])), {1: Seat(peer)}) as port:
            for step in range(int(sys.argv[5])):
                await port.send(key(step), (1,), random.Random(step).randbytes(100_000))
            print("sent", flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def links_of(node: Node, directory: Path, nursery: trio.Nursery) -> TensorLinks:
    """The tensor links of a host."""
    links = TensorLinks(node.host, directory, nursery)
    node.host.serve(PROTOCOL, links.serve)
    return links


async def test_payloads_survive_the_loss_of_every_connection(tmp_path: Path) -> None:
    async with start_nodes(2) as (a, b), trio.open_nursery() as nursery:
        seats = {0: Seat(a.host.peer), 1: Seat(b.host.peer)}
        one = links_of(a, tmp_path, nursery).open(place(0, to={1}), seats)
        two = links_of(b, tmp_path, nursery).open(place(1, comes={0: expected()}), seats)
        with one, two:

            async def send() -> None:
                for step in range(40):
                    await one.send(key(step), (1,), random.Random(step).randbytes(PAYLOAD_BYTES))

            nursery.start_soon(send)
            for step in range(40):
                assert await two.want(key(step)) == random.Random(step).randbytes(PAYLOAD_BYTES)
                if step in (5, 20):
                    a.host.links.drop(b.host.peer, "the test")
        assert not a.host.standing.reasons
        assert not b.host.standing.reasons
        nursery.cancel_scope.cancel()


async def test_a_killed_peer_is_missed_and_its_successor_goes_on(
    tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    async with start_nodes(1) as (node,), trio.open_nursery() as nursery:
        links = links_of(node, tmp_path / "b", nursery)

        def start(seed: bytes, epoch: int, steps: int) -> tuple[subprocess.Popen[str], bytes]:
            arguments = [seed.hex(), node.address, str(tmp_path / seed.hex()[:4]), str(epoch), str(steps)]
            return spawn(CHILD, *arguments), SigningKey.from_seed(seed).public

        first, peer = start(b"\x51" * 32, 0, 10)
        with links.open(place(1, comes={0: expected()}), {0: Seat(peer)}) as port:
            got: list[bytes] = [await port.want(key(step)) for step in range(10)]
            first.send_signal(signal.SIGKILL)
            first.wait()

            async def rest() -> None:
                got.extend([await port.want(key(step)) for step in range(10, 20)])

            nursery.start_soon(rest)
            await until(lambda: any(not waits.linked for waits in port.waiting_for()))
            (waits,) = port.waiting_for()
            assert (waits.unit, waits.peer, waits.key) == (0, peer, key(10))
            _, successor = start(b"\x52" * 32, 1, 20)
            port.replace(0, successor, 1)
            await until(lambda: len(got) == 20)
            assert got == [random.Random(step).randbytes(100_000) for step in range(20)]
            assert port.bytes_in == 20 * 100_000, "what was here was not sent again"
            assert not port.differences
        nursery.cancel_scope.cancel()



async def test_a_shaper_delays_whatever_a_host_sends(tmp_path: Path) -> None:
    async with start_nodes(2, shaper=parse_shaper("30ms,500mbit")) as (a, b), trio.open_nursery() as nursery:
        assert await a.host.measure(b.host.peer) >= 60
        seats = {0: Seat(a.host.peer), 1: Seat(b.host.peer)}
        one = links_of(a, tmp_path, nursery).open(place(0, to={1}), seats)
        two = links_of(b, tmp_path, nursery).open(place(1, comes={0: expected()}), seats)
        with one, two:
            await one.send(key(0), (1,), b"x" * PAYLOAD_BYTES)
            assert await two.want(key(0)) == b"x" * PAYLOAD_BYTES
        for node in (a, b):
            node.host.links.reshape(parse_shaper("70ms"))
        assert await a.host.measure(b.host.peer) >= 140
        nursery.cancel_scope.cancel()
