"""Gossip over a line of hosts: how much of what one peer says arrives at the far end, how late, and what was dropped.

Run `python benchmarks/gossip.py [--hosts 6] [--rate 200] [--seconds 20] [--json]`. Each host is a process of its own
with libp2p over loopback, linked to its neighbours in the line alone; each checks every signature of every record, as a
daemon's node does. The first makes signed asks at an even rate. Two ways in the same run: bundles, as the daemon sends
them (peer/desk.py, one signed message a tick of 100 ms), and one message a record, what it would be without bundles.
Latency is from the moment its message leaves the first host, and from the moment the record was made. The count ends
when the far end has heard nothing new for DRAIN_SECONDS; what is missing there then must be in the drops of some host,
or it was lost silently: `unaccounted`. One machine, so hosts share its cores. The last line with --json is one object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from market.ledger import Ledger
from peer.desk import MARKET, Desk, Means
from peer.drops import merged
from peer.events import GossipIn, Publish
from peer.host import Host, HostConfig, open_host
from peer.intake import Bundle, records_in, refuse_bundle
from protocol import params
from protocol.codec import decode, encode
from protocol.keys import SigningKey
from protocol.network import Network, Rules
from protocol.records import Ask, open_record, seal

NETWORK: Final = Network("line", Rules(), ())
SETTLE_SECONDS: Final = 4.0  # heartbeats of one second, in which neighbours learn who wants which topic
DRAIN_SECONDS: Final = 3.0
WAYS: Final = ("bundles", "one message a record")


# --- one host, in a process of its own ---------------------------------------------------------------------
def ask(key: SigningKey, number: int) -> bytes:
    """A signed ask; its sequence number says which record it is."""
    now = time.time_ns()
    return seal(
        Ask(
            network=NETWORK.id, peer=key.public, slot=0, sequence=number, roles=1, unit_price=1000,
            memory_bytes=2**30, sandbox=3, operations_per_second=10**9, created_ns=now, expires_ns=now + 600 * 10**9,
        ),
        key,
    )  # fmt: skip


async def listen(host: Host, seen: dict[int, int]) -> None:
    """Note when each record came first, ns of the machine's monotonic clock."""
    async for event in host.events:
        if isinstance(event, GossipIn):
            now = time.monotonic_ns()
            for envelope in decode(Bundle, event.data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX):
                record, _, _ = open_record(envelope, network=NETWORK.id)
                assert isinstance(record, Ask)
                seen.setdefault(record.sequence, now)


async def speak(host: Host, key: SigningKey, way: str, rate: int, seconds: float) -> dict[str, Any]:
    """Make rate x seconds records, evenly. Returns when each was made and when its message left."""
    import random

    desk = Desk(key, NETWORK, random.Random(0), Ledger(), Means())
    made: list[int] = []
    left: list[int] = []
    start, tick_ns = time.monotonic_ns(), params.TICK_MS * 10**6
    next_tick = start + tick_ns
    while len(left) < rate * seconds:
        due = start + len(made) * 10**9 // rate if len(made) < rate * seconds else next_tick
        await trio.sleep(max(0, min(due, next_tick) - time.monotonic_ns()) / 1e9)
        now = time.monotonic_ns()
        while len(made) < rate * seconds and start + len(made) * 10**9 // rate <= now:
            made.append(time.monotonic_ns())
            envelope = ask(key, len(made))
            if way == WAYS[0]:
                desk.publish(MARKET, envelope)
            else:
                left.append(time.monotonic_ns())
                await host.publish(MARKET, encode([envelope]))
        if now >= next_tick:
            next_tick += tick_ns
            desk.now_ns = time.time_ns()
            desk.flush_outbox()
            effects, desk.effects = desk.effects, []
            for effect in effects:
                assert isinstance(effect, Publish)
                left += [time.monotonic_ns()] * records_in(effect.data)
                await host.publish(effect.topic, effect.data)
    return {"made": made, "left": left, "own_drops": merged(desk.drops)["reasons"]}


async def serve(seed: int, way: str, rate: int, seconds: float, connect: str) -> None:
    """Be one host of the line; speak or listen when told so, and report on stdout."""
    params.LINKS_WANTED = 1  # type: ignore[misc]  # nobody dials beyond its neighbours: a line stays a line
    key = SigningKey.from_seed(seed.to_bytes(32, "big"))
    config = HostConfig(
        seed.to_bytes(32, "big"), ["/ip4/127.0.0.1/tcp/0"], (MARKET,), False, NETWORK.id.hex()[:16], refuse_bundle,
        records_in,
    )  # fmt: skip
    async with open_host(config) as host, trio.open_nursery() as nursery:
        seen: dict[int, int] = {}
        nursery.start_soon(listen, host, seen)
        if connect:
            await host.connect(connect)
        print(json.dumps(host.addresses[0]), flush=True)
        order = await trio.to_thread.run_sync(sys.stdin.readline)
        begun = time.process_time()
        said = await speak(host, key, way, rate, seconds) if order.strip() == "speak" else {}
        print(json.dumps(said), flush=True)
        while (await trio.to_thread.run_sync(sys.stdin.readline)).strip() == "count":
            print(json.dumps(len(seen)), flush=True)
        links = {peer.hex() for peer in host.peers()}
        told = {"seen": seen, "drops": merged(host.drops)["reasons"], "links": len(links), "stats": host.stats()}
        told["cpu_seconds"] = time.process_time() - begun
        print(json.dumps(told), flush=True)
        await trio.sleep_forever()  # who goes before the others have told changes what they see


# --- the line ----------------------------------------------------------------------------------------------
def answer(child: subprocess.Popen[str], order: str = "") -> Any:
    """Give a host an order, if any, and read its next line."""
    assert child.stdin is not None and child.stdout is not None
    if order:
        child.stdin.write(order + "\n")
        child.stdin.flush()
    return json.loads(child.stdout.readline())


def run(way: str, hosts: int, rate: int, seconds: float) -> dict[str, Any]:
    """One line of processes, one way of sending."""
    line: list[subprocess.Popen[str]] = []
    try:
        address = ""
        for seed in range(1, hosts + 1):
            command = [sys.executable, str(Path(__file__)), "--serve", str(seed), "--way", way, "--rate", str(rate)]
            command += ["--seconds", str(seconds), "--connect", address]
            line.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            address = answer(line[-1])
        time.sleep(SETTLE_SECONDS)
        for child in line[1:]:
            answer(child, "listen")
        said = answer(line[0], "speak")
        heard = -1
        while heard < (heard := answer(line[-1], "count")):
            time.sleep(DRAIN_SECONDS)
        told = [answer(child, "tell") for child in line]
    finally:
        for child in line:
            child.terminate()
            child.wait()
    return summary(way, said, told)


def summary(way: str, said: dict[str, Any], told: list[dict[str, Any]]) -> dict[str, Any]:
    """What arrived at the far end, how late, and what became of the rest."""
    arrived = {int(number): at for number, at in told[-1]["seen"].items()}
    drops: dict[str, int] = dict(said["own_drops"])
    for one in told:
        for reason, count in one["drops"].items():
            drops[reason] = drops.get(reason, 0) + count
    links = [one["links"] for one in told]
    assert links == [1, *[2] * (len(told) - 2), 1], f"this is no line: {links}"
    sent, missing = len(said["made"]), len(said["made"]) - len(arrived)

    def late_ms(since: list[int]) -> dict[str, float]:
        spans = [(at - since[number - 1]) / 1e6 for number, at in arrived.items()]
        return {f"p{q}": round(float(np.percentile(spans, q)), 1) for q in (50, 95, 99)} if spans else {}

    return {
        "way": way,
        "records": sent,
        "messages": told[0]["stats"]["gossip_published"],
        "received": len(arrived),
        "received_share": len(arrived) / sent,
        "latency_ms_since_sent": late_ms(said["left"]),
        "latency_ms_since_made": late_ms(said["made"]),
        "seen_at_each_host": [len(one["seen"]) for one in told[1:]],
        "drops": drops,
        "unaccounted": max(0, missing - sum(drops.values())),
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in told), 2),  # of all hosts, from when they met
        "bytes_out": sum(one["stats"]["bytes_out"] for one in told),
    }


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=6)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, default="", help=argparse.SUPPRESS)
    parser.add_argument("--connect", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        trio.run(serve, given.serve, given.way, given.rate, given.seconds, given.connect)
        return
    found = [run(way, given.hosts, given.rate, given.seconds) for way in WAYS]
    if given.json:
        print(json.dumps({"hops": given.hosts - 1, "rate": given.rate, "seconds": given.seconds, "ways": found}))
        return
    print(f"{given.hosts - 1} hops, {given.rate} records/s for {given.seconds:.0f} s")
    for one in found:
        sent, made = one["latency_ms_since_sent"], one["latency_ms_since_made"]
        print(f"{one['way']}: {one['received']} of {one['records']} records in {one['messages']} messages")
        print(f"  since sent p50 {sent.get('p50')} ms, p95 {sent.get('p95')} ms; since made {made.get('p50')}", end="")
        print(f", {made.get('p95')} ms; dropped {one['drops'] or 'nothing'}, unaccounted {one['unaccounted']}")
        print(f"  {one['cpu_seconds']} s of processor over all hosts, {one['bytes_out'] / 1e6:.1f} MB on the wire")


if __name__ == "__main__":
    main()
