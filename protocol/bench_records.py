"""The two signed records of a bench card: the challenge, and the card that answers it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint

__all__ = ["BenchCard", "BenchChallenge"]


class BenchChallenge(
    msgspec.Struct,
    frozen=True,
    array_like=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag="ichiba/bench-challenge/1",
):
    """Multiply this chain (protocol/bench_card.py) now. A peer that challenges itself makes a self-timed card."""

    network: Digest
    challenger: PeerKey
    peer: PeerKey
    nonce: Digest
    side: Literal[256, 512, 1024, 2048, 4096]
    links: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_LINKS_MAX)]
    memory_blocks: Annotated[int, msgspec.Meta(ge=0, le=params.BENCH_MEMORY_BLOCKS_MAX)]
    window_ns: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_WINDOW_NS_MAX)]
    created_ns: Uint
    expires_ns: Uint


class BenchCard(
    msgspec.Struct,
    frozen=True,
    array_like=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag="ichiba/bench-card/1",
):
    """Proof of capacity: signed by its peer, and by the challenger who timed it and probed its memory.

    Proven: the chain's result (the blob `evidence`) and, for who trusts the challenger's clock, `elapsed_ns` and the
    memory under `memory_root`. The peer's word only: the other figures, per second and in bytes.
    """

    network: Digest
    peer: PeerKey
    challenger: PeerKey
    challenge: Annotated[bytes, msgspec.Meta(max_length=2048)]  # an Envelope of the BenchChallenge
    evidence: Digest
    elapsed_ns: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_WINDOW_NS_MAX)]
    memory_root: Digest
    float32_per_second: Uint
    memory_bytes: Uint
    memory_bytes_per_second: Uint
    disk_bytes: Uint
    disk_bytes_per_second: Uint
    cores: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    device: Annotated[str, msgspec.Meta(max_length=96, pattern=r"^[ -~]*\Z")]  # it is shown on terminals
    created_ns: Uint
    expires_ns: Uint
