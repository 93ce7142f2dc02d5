"""Hosts for swarm tests: real sockets on loopback, real processes, and attackers that really send."""

from __future__ import annotations

import functools
import inspect
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from peer.addresses import parse_address
from peer.host import GossipIn, Host, HostConfig, MessageIn, PeerDown, PeerUp, open_host
from protocol.errors import MalformedRecord

T = TypeVar("T", GossipIn, MessageIn, PeerDown, PeerUp)
SECONDS_MAX = 60  # every test ends by then: ten times what the longest takes on two idle cores
_seeds = itertools.count(1)


def validator(topic: str, author: bytes, data: bytes) -> None:
    """What all hosts of these tests think of gossip."""
    if data.startswith(b"bad"):
        raise MalformedRecord("a bad record")
    if data.startswith(b"crash"):
        raise KeyError("a validator with a bug")


def make_config(**changes: Any) -> HostConfig:
    """A loopback host with a key of its own."""
    seed = next(_seeds).to_bytes(32, "big")
    return replace(HostConfig(seed, ["/ip4/127.0.0.1/tcp/0"], ("offers",), False, "test", validator), **changes)


@dataclass(eq=False)
class Node:
    """A host and everything it told so far."""

    host: Host
    events: list[Any] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)

    async def collect(self) -> None:
        async for event in self.host.events:
            self.events.append(event)
            self.news.set()
            self.news = trio.Event()

    async def wait_for(self, kind: type[T], count: int = 1) -> list[T]:
        """The first `count` events of `kind`."""
        while len(found := self.of(kind)) < count:
            await self.news.wait()
        return found

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def address(self) -> str:
        return self.host.addresses[0]


@asynccontextmanager
async def start_node(config: HostConfig | None = None) -> AsyncIterator[Node]:
    """A running host whose events are collected."""
    async with open_host(config or make_config()) as host, trio.open_nursery() as nursery:
        node = Node(host)
        nursery.start_soon(node.collect)
        yield node
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def start_nodes(count: int, **changes: Any) -> AsyncIterator[list[Node]]:
    """`count` hosts, each linked to every other. changes: of their configuration."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(start_node(make_config(**changes))) for _ in range(count)]
        for place, node in enumerate(nodes):
            for other in nodes[:place]:
                await node.host.connect(other.address)
        for node in nodes:
            await node.wait_for(PeerUp, count - 1)
        yield nodes


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event; the test's deadline bounds it."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


async def dial_raw(address: str) -> trio.SocketStream:
    """A bare TCP connection to a host, for those who do not speak libp2p."""
    place = parse_address(address)
    return await trio.open_tcp_stream(place.host, place.port)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Every trio test in this folder ends within SECONDS_MAX: a hang is a failure with a stack."""
    for item in items:
        if item.path.parent == Path(__file__).parent and inspect.iscoroutinefunction(item.obj):
            item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(SECONDS_MAX):
            await test(*args, **kwargs)

    return run


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -c CODE ARGUMENTS` as a process of its own; whatever is left is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
