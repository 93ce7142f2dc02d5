"""A file of measured links, from anybody: an .npz of numpy arrays, read without pickle and within limits.

What is in it is believed no further than market.placement checks it. Refuses to know what the links are for.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from market.placement import Devices, Links, PlacementRefused
from protocol.params import PLACEMENT_DEVICES_MAX, PLACEMENT_FILE_BYTES_MAX

__all__ = ["read_links"]

_LINKS: Final = ("delay_ms", "gbps")
_DEVICES: Final = ("work_s", "memory_gb", "price_credits", "failure")
_MADE_BY: Final = "save it with numpy.savez(FILE, delay_ms=..., gbps=...)"
_ELEMENT_BYTES_MAX: Final = 16


def read_links(
    path: Path, *, memory_needed_gb: float, seconds_per_credit: float, recovery_s: float
) -> tuple[Links, Devices]:
    """delay_ms and gbps (N, N) of the file, and of its devices what it says: work_s, memory_gb, price_credits, failure
    (N,).

    Raises PlacementRefused, with the reason; OSError where the file cannot be read at all.
    """
    if path.stat().st_size > PLACEMENT_FILE_BYTES_MAX:
        raise PlacementRefused(f"{path.name} has {path.stat().st_size} bytes, of at most {PLACEMENT_FILE_BYTES_MAX}")
    try:
        with zipfile.ZipFile(path) as archive:
            there = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in _LINKS if name not in there]
            if missing:
                raise PlacementRefused(
                    f"{path.name} has no array {' and no array '.join(missing)}",
                    why=f"it holds {', '.join(sorted(there)[:10]) or 'nothing'}",
                    next_step=_MADE_BY,
                )
            found = {name: _array(archive, there[name]) for name in (*_LINKS, *_DEVICES) if name in there}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, struct.error, EOFError) as error:
        raise PlacementRefused(f"{path.name} is no .npz file: {error}", next_step=_MADE_BY) from None
    columns: dict[str, Any] = {}
    for name in _DEVICES:
        if name in found:
            if found[name].ndim != 1:
                raise PlacementRefused(f"{name} has the shape {found[name].shape}", why="it is one number a device")
            columns[name] = found[name].tolist()
    devices = Devices(
        **columns, memory_needed_gb=memory_needed_gb, seconds_per_credit=seconds_per_credit, recovery_s=recovery_s
    )
    return Links(found["delay_ms"], found["gbps"]), devices


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array of real numbers, its header held against the limits before its data is unpacked."""
    most = PLACEMENT_DEVICES_MAX**2 * _ELEMENT_BYTES_MAX
    if info.file_size > most:
        raise PlacementRefused(f"{info.filename} unpacks to {info.file_size} bytes, of at most {most}")
    with archive.open(info) as stream:
        shape, dtype = _header(stream, info.filename)
    if dtype.kind not in "fiu" or dtype.itemsize > _ELEMENT_BYTES_MAX:
        raise PlacementRefused(f"{info.filename} holds {dtype}, not real numbers", next_step="save it as float64")
    if len(shape) > 2 or any(not 0 <= side <= PLACEMENT_DEVICES_MAX for side in shape):
        raise PlacementRefused(
            f"{info.filename} has the shape {shape}", why=f"a plan takes at most {PLACEMENT_DEVICES_MAX} devices"
        )
    try:
        with archive.open(info) as stream:
            read: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise PlacementRefused(f"{info.filename} ends early or is damaged: {error}", next_step=_MADE_BY) from None
    return read


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError) as error:  # numpy lets all of them through
        raise PlacementRefused(f"{name} is no numpy array: {error}", next_step=_MADE_BY) from None
    return shape, dtype
