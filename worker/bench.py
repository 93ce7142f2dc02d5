"""Makes what a bench card proves: multiplies the chain of a challenge, fills memory and opens it, measures the device.

Runs as a process of its own (`python -m worker.bench`), because torch is loaded in none of ours: one JSON object a
line in, some out, until the input ends. The orders are its owner's; of a stranger come only a challenge's id and
sizes, which protocol/bench_card.py bounds. It signs nothing and knows no network.

The product is taken by the fastest exact way there is: float32 (sums of 1,024 products of values up to 126 by 125
stay below 2**24, so no addition rounds, in whatever order), or where they are faster int8 (torch._int_mm) or the
16-bit multiply-add of the compiled helper (elements fit its 8 bits, and its result is one rounding of the exact sum).
All give the same bits.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol import params
from protocol.bench_card import (
    INNER_MAX,
    LANES,
    LARGEST,
    PRIME,
    Figures,
    Opening,
    base_matrix,
    chain_operations,
    first_block,
    next_block,
    partner_of,
    row_orders,
    work_seed,
)
from protocol.merkle import merkle_levels

__all__ = [
    "BACKENDS",
    "Chain",
    "Chained",
    "Fill",
    "Filled",
    "Measure",
    "Measured",
    "Memory",
    "Moved",
    "Open",
    "Opened",
    "Order",
    "Reply",
    "chain_result",
    "measure",
]

_BLOCK: Final = params.BENCH_MEMORY_BLOCK_BYTES
BACKENDS: Final = ("float32", "int8", "int16")
_HELPER_WIDTH: Final = 8
_TRIAL_SIDE: Final = 1024
_COPY_BYTES: Final = 256 << 20  # well beyond any cache
_DISK_BYTES: Final = 64 << 20


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Measure the device; the disk is that of `directory`. Answered by Measured."""

    directory: str
    threads: int


class Chain(msgspec.Struct, frozen=True, tag="chain"):
    """Multiply the chain of a challenge and write the result to `evidence`. Answered by Moved, then Chained."""

    challenge: bytes
    side: int
    links: int
    threads: int
    evidence: str


class Fill(msgspec.Struct, frozen=True, tag="fill"):
    """Fill `blocks` blocks of memory and keep them. Answered by Moved, then Filled."""

    challenge: bytes
    blocks: int


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Open blocks of the memory that was filled last. Answered by Opened."""

    indices: tuple[int, ...]


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """How far the order is."""

    done: int
    total: int


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """exact_per_second: operations a second of exact integer products, what a chain is sized by."""

    exact_per_second: int
    figures: Figures


class Chained(msgspec.Struct, frozen=True, tag="chained"):
    """The result is in its file."""

    elapsed_ns: int


class Filled(msgspec.Struct, frozen=True, tag="filled"):
    """The Merkle root over the blocks; zeros for none."""

    root: bytes


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """In the order asked."""

    openings: tuple[Opening, ...]


Order = Measure | Chain | Fill | Open
Reply = Moved | Measured | Chained | Filled | Opened


# --- the chain ---------------------------------------------------------------------------------------------
def _reduce(sums: Any, quotient: Any) -> None:
    """Float32 integers below 2**24 modulo 251 into [-126, 126], in place: off by one near a half is put right last."""
    import torch

    torch.mul(sums, 1 / PRIME, out=quotient)
    sums.sub_(quotient.round_(), alpha=PRIME)


def chain_result(
    challenge: bytes,
    side: int,
    links: int,
    *,
    threads: int = 1,
    backend: str = "",
    on_link: Callable[[int], None] = lambda _: None,
) -> bytes:
    """The results of a chain, int8 (LANES, side, side) row-major: the same for every backend of BACKENDS.

    Without a backend the faster one is taken. on_link(done) is called after each link.
    """
    import torch

    from worker.exact import compiled

    torch.set_num_threads(threads)
    seed = work_seed(challenge)
    base = torch.from_numpy(base_matrix(seed, side))
    backend = backend or _fastest()
    base = base if backend == "int8" else base.float()
    lanes, rows = [base.clone() for _ in range(LANES)], torch.empty_like(base)
    total, part, quotient = (torch.empty(side, side) for _ in range(3))
    for done, orders in enumerate(row_orders(seed, side, links), 1):
        for state, order in zip(lanes, torch.from_numpy(orders), strict=True):
            torch.index_select(base, 0, order, out=rows)
            for first in range(0, side, INNER_MAX):
                left, right = state[:, first : first + INNER_MAX], rows[first : first + INNER_MAX]
                into = part if first else total
                if backend == "int8":
                    into.copy_(torch._int_mm(left.contiguous(), right))
                elif backend == "int16":
                    into.copy_(compiled.product(left, right, _HELPER_WIDTH))
                else:
                    torch.mm(left, right, out=into)
                _reduce(into, quotient)
                if first:
                    total.add_(part)
            if side > INNER_MAX:
                _reduce(total, quotient)
            state.copy_(total)  # to bytes, where the state is bytes
        on_link(done)
    last = torch.stack(lanes).to(torch.int16)
    last[last > LARGEST] -= PRIME
    last[last < -LARGEST] += PRIME
    return bytes(last.to(torch.int8).numpy().tobytes())


def _seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The best of some runs, after one that warms up."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return max(min(taken), 1e-9)


def _fastest() -> str:
    """The backend whose product is fastest here, of those that are there and exact."""
    import torch

    from worker.exact import compiled
    from worker.exact.products import int8_is_exact

    left = torch.ones(512, 512)
    bytes_ = left.to(torch.int8)
    taken = {"float32": _seconds(lambda: left @ left)}
    if int8_is_exact():
        taken["int8"] = _seconds(lambda: torch._int_mm(bytes_, bytes_), 1)
    if compiled.has_products():
        taken["int16"] = _seconds(lambda: compiled.product(left, left, _HELPER_WIDTH))
    return min(taken, key=lambda backend: taken[backend])


# --- memory ------------------------------------------------------------------------------------------------
class Memory:
    """Blocks filled from a challenge, kept in memory, and the tree over them."""

    def __init__(self, challenge: bytes, blocks: int, *, on_block: Callable[[int], None] = lambda _: None) -> None:
        self.count = blocks
        self._held = bytearray(blocks * _BLOCK)
        before = b""
        for index in range(blocks):
            if index == 0:
                made = first_block(challenge)
            elif index == 1:
                made = next_block(challenge, index, before, bytes(_BLOCK))
            else:
                made = next_block(challenge, index, before, self._block(partner_of(before, index)))
            self._held[index * _BLOCK : (index + 1) * _BLOCK] = made
            before = made
            on_block(index + 1)
        self._levels = merkle_levels([self._view(index) for index in range(blocks)])

    def _view(self, index: int) -> memoryview:
        return memoryview(self._held)[index * _BLOCK : (index + 1) * _BLOCK]

    def _block(self, index: int) -> bytes:
        return bytes(self._view(index))

    @property
    def root(self) -> bytes:
        """The commitment; zeros for no memory."""
        return self._levels[-1][0] if self._levels else bytes(32)

    def open(self, index: int) -> Opening:
        """Block `index` with the blocks it is made of."""
        places = [index, index - 1][: min(index + 1, 2)]
        if index >= 2:
            places.append(partner_of(self._block(index - 1), index))
        return Opening(index, tuple(map(self._block, places)), tuple(map(self._path, places)))

    def _path(self, index: int) -> tuple[bytes, ...]:
        path = []
        for level in self._levels[:-1]:
            if (sibling := index ^ 1) < len(level):
                path.append(level[sibling])
            index //= 2
        return tuple(path)


# --- the device --------------------------------------------------------------------------------------------
def _device() -> str:
    """The processor's name, as the system tells it, in printable ASCII."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return "".join(c for c in name if " " <= c <= "~")[:96]


def _disk(directory: Path) -> tuple[int, int]:
    """Free bytes, and bytes a second written and forced to the disk. Raises OSError."""
    file = directory / f"bench-{os.getpid()}.part"
    data = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with file.open("wb") as out:
            for _ in range(_DISK_BYTES >> 20):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        taken = time.perf_counter() - start
    finally:
        file.unlink(missing_ok=True)
    return shutil.disk_usage(directory).free, int(_DISK_BYTES / taken)


def measure(directory: Path, threads: int) -> Measured:
    """Measure this device, in about a second. Raises OSError if nothing can be written to `directory`."""
    import torch

    torch.set_num_threads(threads)
    one = torch.randint(-LARGEST, LARGEST + 1, (_TRIAL_SIDE, _TRIAL_SIDE)).float()
    other, out = torch.randn(_TRIAL_SIDE, _TRIAL_SIDE), torch.empty(_TRIAL_SIDE, _TRIAL_SIDE)
    links = 2
    fastest = _fastest()
    exact = _seconds(lambda: chain_result(bytes(32), _TRIAL_SIDE, links, threads=threads, backend=fastest), 1)
    float32 = _seconds(lambda: torch.mm(one, other, out=out))
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source))
    free, disk = _disk(directory)
    figures = Figures(
        float32_per_second=int(2 * _TRIAL_SIDE**3 / float32),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_bytes_per_second=int(2 * _COPY_BYTES / copied),  # read once, written once
        disk_bytes=free,
        disk_bytes_per_second=disk,
        cores=os.cpu_count() or 1,
        threads=threads,
        device=_device(),
    )
    return Measured(int(chain_operations(_TRIAL_SIDE, links) / exact), figures)


# --- the process -------------------------------------------------------------------------------------------
class _Bench:
    """Takes orders one by one; `say` writes a reply."""

    def __init__(self, say: Callable[[Reply], None]) -> None:
        self.say = say
        self.memory: Memory | None = None
        self._told = 0.0

    def _move(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told > 0.2 or done == total:
            self._told = now
            self.say(Moved(done, total))

    def take(self, order: Order) -> None:
        """Carry out one order. torch is loaded by the first that multiplies."""
        match order:
            case Measure(directory=directory, threads=threads):
                self.say(measure(Path(directory), threads))
            case Chain():
                start = time.monotonic_ns()
                links = order.links
                result = chain_result(
                    order.challenge,
                    order.side,
                    links,
                    threads=order.threads,
                    on_link=lambda done: self._move(done, links),
                )
                Path(order.evidence).write_bytes(result)
                self.say(Chained(time.monotonic_ns() - start))
            case Fill(challenge=challenge, blocks=blocks):
                self.memory = None  # the old one first: both need not fit
                self.memory = Memory(challenge, blocks, on_block=lambda done: self._move(done, blocks))
                self.say(Filled(self.memory.root))
            case Open(indices=indices):
                assert self.memory is not None, "opened before it was filled"
                self.say(Opened(tuple(map(self.memory.open, indices))))


def main() -> None:
    """Orders from standard input, replies to standard output, until the input ends."""
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(Order)

    def say(reply: Reply) -> None:
        sys.stdout.buffer.write(encoder.encode(reply) + b"\n")
        sys.stdout.buffer.flush()

    bench = _Bench(say)
    for line in sys.stdin.buffer:
        bench.take(decoder.decode(line))


if __name__ == "__main__":
    main()
