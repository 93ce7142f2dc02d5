"""Checkpoints as bytes: a strict reader and a canonical writer of the safetensors format, without torch.

Bytes from a stranger are read here, so everything the format leaves open is refused: names twice, tensors that
overlap or leave a gap, dtypes we do not compute with, headers that are not minimal JSON of the expected kind,
bytes after the last tensor, and, given a layout, any difference from it. Nothing is copied: the arrays are
read-only views of the buffer. The format: https://github.com/huggingface/safetensors#format (a header length as
8 little-endian bytes, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord

__all__ = ["Layout", "layout_of", "parse", "write"]

Layout = Mapping[str, tuple[str, Sequence[int]]]
"""Name -> (numpy dtype name, shape)."""

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES: Final = {dtype.name: code for code, dtype in _DTYPES.items()}
_NAME_BYTES_MAX: Final = 1024


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedRecord("a key occurs twice in a safetensors header")
    return found


def _refuse_constant(name: str) -> Any:
    raise MalformedRecord(f"safetensors header holds {name}")


def _refuse_float(text: str) -> Any:
    raise MalformedRecord(f"safetensors header holds the fraction {text[:20]}")


def _bounded_integer(text: str) -> int:
    if len(text) > 16:
        raise MalformedRecord(f"safetensors header holds a number of {len(text)} digits")
    return int(text)


def _header(buffer: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The decoded JSON header and the bytes after it."""
    if len(buffer) < 8:
        raise MalformedRecord(f"a safetensors file of {len(buffer)} bytes")
    size = int.from_bytes(buffer[:8], "little")
    if size > params.SAFETENSORS_HEADER_BYTES_MAX:
        raise LimitExceeded(f"safetensors header of {size} bytes, at most {params.SAFETENSORS_HEADER_BYTES_MAX}")
    if 8 + size > len(buffer):
        raise MalformedRecord(f"safetensors header of {size} bytes in a file of {len(buffer)}")
    try:
        decoded = json.loads(
            bytes(buffer[8 : 8 + size]).decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_refuse_float,
            parse_int=_bounded_integer,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise MalformedRecord(f"safetensors header is no JSON: {error}"[:200]) from None
    if not isinstance(decoded, dict):
        raise MalformedRecord("safetensors header is no JSON object")
    return decoded, buffer[8 + size :]


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor; types and sizes checked against one another."""
    if len(name.encode("utf-8", "surrogatepass")) > _NAME_BYTES_MAX:
        raise LimitExceeded(f"a tensor's name has {len(name)} characters, at most {_NAME_BYTES_MAX} bytes")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedRecord(f"tensor {name[:80]!r} has not exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise MalformedRecord(f"tensor {name[:80]!r} has dtype {str(code)[:20]!r}", next_step="use float32 or int64")
    for numbers in (shape, offsets):
        # bool is an int to Python; a size of `true` is refused here.
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise MalformedRecord(f"tensor {name[:80]!r} has a shape or offsets that are no lists of sizes")
    if len(shape) > params.TENSOR_RANK_MAX or len(offsets) != 2:
        raise MalformedRecord(f"tensor {name[:80]!r} has rank {len(shape)} and {len(offsets)} offsets")
    elements = math.prod(shape)
    if elements > params.TENSOR_ELEMENTS_MAX:
        raise LimitExceeded(f"tensor {name[:80]!r} has {elements} elements, at most {params.TENSOR_ELEMENTS_MAX}")
    if offsets[1] - offsets[0] != elements * _DTYPES[code].itemsize:
        raise MalformedRecord(f"tensor {name[:80]!r} of shape {shape} spans bytes {offsets[0]} to {offsets[1]}")
    return _DTYPES[code], tuple(shape), offsets[0], offsets[1]


def _check_layout(entries: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int, int]], layout: Layout) -> None:
    if entries.keys() != layout.keys():
        missing, extra = sorted(layout.keys() - entries.keys()), sorted(entries.keys() - layout.keys())
        raise MalformedRecord(f"checkpoint lacks {missing[:3]} and has {extra[:3]} that the program does not"[:300])
    for name, (dtype, shape) in layout.items():
        found = entries[name]
        if (found[0].name, found[1]) != (dtype, tuple(shape)):
            raise MalformedRecord(
                f"tensor {name} is {found[0].name} {found[1]}, the program says {dtype} {tuple(shape)}"
            )


def parse(data: bytes | bytearray | memoryview, layout: Layout | None = None) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, as read-only views of `data`, in name order.

    layout: what the file must hold, no more and no less; None accepts any layout. float32, int64, int32, uint8
    and bool only; a bool byte other than 0 or 1 is refused. Raises MalformedRecord, LimitExceeded.
    """
    header, body = _header(memoryview(data).cast("B").toreadonly())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedRecord("safetensors metadata is no object of strings")
    if len(header) > params.SAFETENSORS_TENSORS_MAX:
        raise LimitExceeded(f"{len(header)} tensors, at most {params.SAFETENSORS_TENSORS_MAX}")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise MalformedRecord(f"tensor {name[:80]!r} starts at byte {first}, the one before ends at {end}")
        end = last
    if end != len(body):
        raise MalformedRecord(f"tensors end at byte {end} of {len(body)}")
    if layout is not None:
        _check_layout(entries, layout)
    found: dict[str, NDArray[Any]] = {}
    for name in sorted(entries):
        dtype, shape, first, last = entries[name]
        if dtype.name == "bool" and (np.frombuffer(body[first:last], dtype=np.uint8) > 1).any():
            raise MalformedRecord(f"tensor {name[:80]!r} holds a bool that is neither 0 nor 1")
        found[name] = np.frombuffer(body[first:last], dtype=dtype).reshape(shape)
    return found


def write(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The one canonical file of `tensors`: names sorted, compact JSON, header padded with spaces to 8 bytes.

    Offsets follow name order and no metadata is written, so equal tensors give equal bytes. Any safetensors
    library reads it. Raises LocalProtocolError for a name or dtype that `parse` would refuse.
    """
    if len(tensors) > params.SAFETENSORS_TENSORS_MAX:
        raise LocalProtocolError(f"{len(tensors)} tensors, at most {params.SAFETENSORS_TENSORS_MAX}")
    header: dict[str, Any] = {}
    parts: list[Any] = [b""]
    end = 0
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype.name not in _CODES or array.ndim > params.TENSOR_RANK_MAX:
            raise LocalProtocolError(f"tensor {name} is {array.dtype.name} of rank {array.ndim}: not a state's")
        if name == "__metadata__" or len(name.encode()) > _NAME_BYTES_MAX:
            raise LocalProtocolError(f"no tensor may be called {name[:80]!r}")
        code = _CODES[array.dtype.name]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
        contiguous = np.ascontiguousarray(array, dtype=_DTYPES[code]).reshape(-1)
        parts.append(contiguous.view(np.uint8).data if contiguous.size else b"")
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    parts[0] = len(encoded).to_bytes(8, "little") + encoded
    return b"".join(parts)


def layout_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout that `parse` checks against."""
    return {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
