"""How tensors travel between the units of a parallel job: compressed, the same bits on every machine. DESIGN §11."""

from worker.compression.change import OutOfStep, decode_change, encode_change, unseen_rows
from worker.compression.codecs import decode, encode
from worker.compression.outer import decode_outer, encode_outer, mean_of, outer_step
from worker.compression.tiles import NotFinite

__all__ = [
    "NotFinite",
    "OutOfStep",
    "decode",
    "decode_change",
    "decode_outer",
    "encode",
    "encode_change",
    "encode_outer",
    "mean_of",
    "outer_step",
    "unseen_rows",
]
