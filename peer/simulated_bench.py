"""The bench processes of a simulated swarm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peer.events import (
    BenchEffect,
    BenchFilled,
    BenchMade,
    BenchWarm,
    CheckWork,
    MemoryOpened,
    OpenMemory,
    StartBench,
    StopBench,
    WarmBench,
    WorkChecked,
)
from peer.simulated_faults import SECOND
from protocol.bench_card import Figures, chain_operations
from protocol.codec import blake
from worker.bench import Memory

if TYPE_CHECKING:
    from peer.simulator import SimulatedPeer, Simulation

__all__ = ["bench_result", "run_bench"]


def bench_result(challenge: bytes) -> bytes:
    """The blob of a simulated challenge's right result."""
    return blake("sim/bench", challenge)


def run_bench(simulation: Simulation, peer: SimulatedPeer, effect: BenchEffect) -> None:
    """A bench process: its chain takes its time, its result is a hash; its memory is real, so keep it small."""
    match effect:
        case WarmBench():
            figures = Figures(
                float32_per_second=peer.bench_speed, memory_bytes=2**30, memory_bytes_per_second=10**10,
                disk_bytes=10**9, disk_bytes_per_second=10**8, cores=1, threads=1, device=peer.device or peer.name,
            )  # fmt: skip
            claim = peer.bench_speed * (10 if peer.bench_lie == "claim" else 1)
            simulation.at(3 * SECOND, peer, BenchWarm(claim, figures))
        case StartBench(id=challenge, challenge=terms):
            took = chain_operations(terms.side, terms.links) * SECOND // peer.bench_speed
            blob = bench_result(bytes(32) if peer.bench_lie == "result" else challenge)
            peer.blobs.add(blob)
            peer.memory = Memory(bytes(32) if peer.bench_lie == "memory" else challenge, terms.memory_blocks)
            simulation.at(took, peer, BenchMade(challenge, blob))
            simulation.at(took + SECOND, peer, BenchFilled(challenge, peer.memory.root))
        case OpenMemory(id=challenge, indices=indices):
            assert peer.memory is not None
            simulation.at(SECOND // 100, peer, MemoryOpened(challenge, tuple(map(peer.memory.open, indices))))
        case StopBench():
            peer.memory = None
        case CheckWork(id=challenge, challenge=terms, evidence=blob):
            holder = simulation.by_key[terms.peer]
            here = holder.node is not None and blob in holder.blobs
            error = "" if here and blob == bench_result(challenge) else "wrong" if here else "no peer has it"
            simulation.at(SECOND // 5, peer, WorkChecked(challenge, error, forged=here and bool(error)))
