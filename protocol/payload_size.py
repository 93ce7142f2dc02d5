"""How many bytes a tensor takes on the wire, from its codec, dtype and shape alone. DESIGN §11.

The sender, the receiver, a checker, the links and the cost model of a placement all need this figure before there is a
tensor; worker/compression/ fills the bytes. docs/decisions/0024-compression.md says why each layout is as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocol import params
from protocol.codec import blake
from protocol.errors import LocalProtocolError
from protocol.operations import ITEM_BYTES
from protocol.stage import FLOWS, Codec, Flow

__all__ = [
    "CHECKSUM_BYTES",
    "FIRST_ITEM_BYTES",
    "HEADER_BYTES",
    "OUTER_FOUR_BITS",
    "SPARSE_BUCKET",
    "SPARSE_CHUNK",
    "TILE_VALUES",
    "TileForm",
    "noise_key",
    "noise_seed",
    "payload_bytes",
    "sparse_chunk_bytes",
    "stream_number",
    "tile_bytes",
    "tile_form",
]

TILE_VALUES: Final = 32  # that share a scale
HEADER_BYTES: Final = 2  # of a tile or sparse payload: what its scale bytes count from
CHECKSUM_BYTES: Final = 8  # of a change payload
FIRST_ITEM_BYTES: Final = 2  # of a value in a change payload whose example was never sent: bfloat16
SPARSE_CHUNK: Final = 4096  # values among which the largest are chosen
SPARSE_BUCKET: Final = 32  # one value of so many is sent


@dataclass(frozen=True)
class TileForm:
    """How codes lie on the wire: `group` of them, each below `levels`, as one number of `group_bits` bits."""

    levels: int
    group: int
    group_bits: int

    def code_bytes(self, count: int) -> int:
        """The bytes of the codes of `count` values."""
        return -(-(-(-count // self.group) * self.group_bits) // 8)


# 12 ** 8 < 2 ** 29: with the scale byte 3.875 bits a value. Plain 4-bit codes and any scale at all miss a factor of 8.
OUTER_FOUR_BITS: Final = TileForm(levels=12, group=8, group_bits=29)


def tile_form(bits: int, flow: Flow) -> TileForm:
    """The form of `bits` (2, 3, 4, 6, 8) bits on links of `flow`."""
    if flow == "outer" and bits == 4:
        return OUTER_FOUR_BITS
    return TileForm(levels=2**bits, group=1, group_bits=bits)


def tile_bytes(form: TileForm, count: int) -> int:
    """The bytes of `count` values in tiles: the header, a scale byte for each tile, the codes; none for no values."""
    return HEADER_BYTES + -(-count // TILE_VALUES) + form.code_bytes(count) if count else 0


def sparse_chunk_bytes(count: int) -> int:
    """The bytes of one chunk of 1 to SPARSE_CHUNK values: two levels, then for one value in 32 its place and code.

    A place takes 7 bits: 5 within its bucket of 32, and the bucket in unary (Elias 1974, Fano 1971); a code 2.
    """
    return 2 + -(-9 * -(-count // SPARSE_BUCKET) // 8)


def _sparse_bytes(count: int) -> int:
    whole, rest = divmod(count, SPARSE_CHUNK)
    chunks = whole * sparse_chunk_bytes(SPARSE_CHUNK) + (sparse_chunk_bytes(rest) if rest else 0)
    return HEADER_BYTES + chunks if count else 0


def payload_bytes(codec: Codec, dtype: str, shape: Sequence[int], *, flow: Flow, unseen: int = 0) -> int:
    """The bytes of a tensor of `dtype` and `shape` by `codec` on a link of `flow`.

    unseen: for the codec `change`, how many of the shape[0] rows were never sent before. Raises LocalProtocolError for
    an unknown dtype and for more unseen rows than there are.
    """
    if dtype not in ITEM_BYTES:
        raise LocalProtocolError(f"tensors of dtype {dtype} do not travel")
    count = math.prod(shape)
    if dtype != "float32" or codec.kind == "float32":
        return count * ITEM_BYTES[dtype]
    if codec.kind == "tile":
        return tile_bytes(tile_form(codec.bits, flow), count)
    if codec.kind == "sparse":
        return _sparse_bytes(count)
    rows = shape[0] if shape else 0
    if not 0 <= unseen <= rows:
        raise LocalProtocolError(f"{unseen} rows never sent of a tensor of shape {tuple(shape)}")
    width = math.prod(shape[1:])
    changes = tile_bytes(tile_form(codec.bits, flow), (rows - unseen) * width)
    return CHECKSUM_BYTES + FIRST_ITEM_BYTES * unseen * width + changes


def stream_number(flow: Flow, unit: int, micro_batch: int, index: int) -> int:
    """The stream of the rounding noise of one tensor that unit `unit` sends, below 2**48: no two of a step share one.

    micro_batch is 0 for the flows `sync` and `outer`; index counts as in Crossing, or the parameters of `outer`.
    """
    for what, value, below in (
        ("unit", unit, params.PARALLEL_UNITS_MAX),
        ("micro-batch", micro_batch, params.MICRO_BATCHES_MAX),
        ("index", index, 2**24),
    ):
        if not 0 <= value < below:
            raise LocalProtocolError(f"{what} {value} of a payload is not in [0, {below})")
    return ((FLOWS.index(flow) * 2**8 + unit) * 2**8 + micro_batch) * 2**24 + index


def noise_seed(run: bytes) -> int:
    """The seed of all rounding noise of a run, below 2**64: both ends of a link draw it, and replicas' tasks differ in
    theirs. run: its digest (Stage.run)."""
    return int.from_bytes(run[:8], "little")


def noise_key(seed: int, stream: int) -> int:
    """The Philox key, below 2**64, of stream `stream` of rounding noise; apart from every draw of the Program itself.

    The noise of a payload is stream 0 of (noise_key, step): 16 bits a value, the lower half of a word first.
    seed: noise_seed of the run. Raises LocalProtocolError for a seed or a stream outside 64 bits.
    """
    if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
        raise LocalProtocolError(f"noise of seed {seed}, stream {stream}: neither may leave 64 bits")
    return int.from_bytes(blake("ichiba/noise", seed.to_bytes(8, "little"), stream.to_bytes(8, "little"))[:8], "little")
