"""The tables of job.toml that make a job parallel: `[parallel]`, and `keep` of `[privacy]`. Read strictly, no torch.

    [parallel]
    stages = 2            # or "auto": as many as the memory of one peer asks for
    replicas = 2          # or "auto": as many as the peers that are wanted allow
    micro_batches = 8     # of one step, each of the size in [batch]: a step reads micro_batches times so many rows
    in_flight = 4         # that the first stage starts ahead; else as many as hide a round trip
    sync = "auto"         # "step": gradients are averaged in each step; "local": weights, at the end of each segment
    compress = "auto"     # "none", or bits forward and backward, as in "4/8"; "tile 4/8" keeps no examples
    share = "auto"        # between replicas: "none", "tile 4" to "tile 8", or "sparse" with sync = "local"
    outer_rate = 0.7      # of Nesterov's momentum on what replicas changed, with sync = "local" (DiLoCo)
    outer_momentum = 0.9

    [privacy]
    keep = ["first", "last"]    # stages that your own peer runs, so that rows and labels never leave it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Literal

from protocol import params
from protocol.stage import Codec

if TYPE_CHECKING:
    from worker.job_file import Table

__all__ = ["PARALLEL_KEYS", "PRIVACY_KEYS", "Compression", "Parallel", "read_keep", "read_parallel"]

PARALLEL_KEYS: Final = (
    "stages", "replicas", "micro_batches", "in_flight", "sync", "compress", "share", "outer_rate", "outer_momentum",
)  # fmt: skip
PRIVACY_KEYS: Final = ("sealed", "keep")
_ENDS: Final = ("first", "last")
_BITS: Final = (2, 3, 4, 6, 8)
_SHARES: Final = ("auto", "none", "sparse", *(f"tile {bits}" for bits in _BITS))

Sync = Literal["auto", "step", "local"]


@dataclass(frozen=True)
class Compression:
    """How tensors travel between stages. keeps: as changes since an example was there last, where that is possible."""

    forward_bits: int
    backward_bits: int
    keeps: bool


@dataclass(frozen=True)
class Parallel:
    """A checked [parallel] table. stages, replicas, in_flight: None for `auto`. compress: None for `auto`; 0 bits are
    float32. share: None for `auto`. outer_rate_nano, outer_momentum_nano: in units of 1e-9."""

    stages: int | None
    replicas: int | None
    micro_batches: int
    in_flight: int | None
    sync: Sync
    compress: Compression | None
    share: Codec | None
    outer_rate_nano: int
    outer_momentum_nano: int


def read_parallel(table: Table) -> Parallel:
    """The table [parallel]. Raises BadJobFile."""
    stages, replicas = _count(table, "stages"), _count(table, "replicas")
    if (stages or 1) * (replicas or 1) > params.PARALLEL_UNITS_MAX:
        table.refuse(
            f"{stages} stages by {replicas} replicas are more than {params.PARALLEL_UNITS_MAX} units",
            next_step="lower stages or replicas",
        )
    if stages == replicas == 1:
        table.refuse("one stage of one replica is no parallel job", next_step=f"raise one of them, or remove {_WHOLE}")
    sync: Sync = table.choice("sync", ("auto", "step", "local"), default="auto")
    share = _share(table.choice("share", _SHARES, default="auto"))
    if share is not None and share.kind == "sparse" and sync == "step":
        table.refuse('share = "sparse" with sync = "step"', next_step='sync = "local", or share = "tile 8"')
    in_flight = table.integer("in_flight", 1, params.MICRO_BATCHES_MAX) if "in_flight" in table.raw else None
    rate, momentum = table.nano("outer_rate", Decimal("0.7")), table.nano("outer_momentum", Decimal("0.9"))
    if momentum >= 10**9:
        table.refuse("outer_momentum is 1 or more", next_step="outer_momentum = 0.9")
    return Parallel(
        stages=stages,
        replicas=replicas,
        micro_batches=table.integer("micro_batches", 1, params.MICRO_BATCHES_MAX),
        in_flight=in_flight,
        sync=sync,
        compress=_compression(table),
        share=share,
        outer_rate_nano=rate,
        outer_momentum_nano=momentum,
    )


def read_keep(raw: Mapping[str, Any], table: Table, *, parallel: bool) -> tuple[str, ...]:
    """The stages that the submitter holds, out of [privacy]. Raises BadJobFile."""
    if "keep" not in raw:
        return ()
    keep = raw["keep"]
    if not isinstance(keep, list) or not keep or any(end not in _ENDS for end in keep) or len(set(keep)) < len(keep):
        table.refuse(f"keep is {keep!r}", next_step='keep = ["first", "last"], or one of them')
    if not parallel:
        table.refuse("keep names stages, and the job has no [parallel]", next_step="add [parallel] with stages = 3")
    return tuple(end for end in _ENDS if end in keep)


def _count(table: Table, key: str) -> int | None:
    if table.raw.get(key) == "auto":
        return None
    return table.integer(key, 1, params.PARALLEL_UNITS_MAX)


def _compression(table: Table) -> Compression | None:
    text = table.take("compress", str, "auto")
    if text == "auto":
        return None
    if text == "none":
        return Compression(0, 0, keeps=False)
    forward, slash, backward = text.removeprefix("tile ").partition("/")
    known = {str(bits) for bits in _BITS}
    if not slash or forward not in known or backward not in known:
        table.refuse(
            f"compress is {text!r}", why=f"bits forward and backward are each one of {', '.join(sorted(known))}",
            next_step='compress = "4/8", "tile 4/8", "none" or "auto"',
        )  # fmt: skip
    return Compression(int(forward), int(backward), keeps=not text.startswith("tile "))


def _share(text: str) -> Codec | None:
    if text == "auto":
        return None
    if text == "none":
        return Codec("float32")
    if text == "sparse":
        return Codec("sparse", 2)
    return Codec("tile", int(text.removeprefix("tile ")))


_WHOLE: Final = "[parallel]"
