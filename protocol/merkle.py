"""Roots that bind a state to 32 bytes, and paths that open one tile of it. DESIGN §7.

A Merkle tree here is binary, its leaves and inner nodes are hashed under different tags (a leaf can never be
shown as a node), and the last node of an odd level is promoted unchanged (a leaf is never duplicated, so two
lists never share a root). Hash: BLAKE2b-256 (RFC 7693) with the tag as its personalisation, which costs no
input: an inner node is one compression, and EIP-152 computes it on chain.

A tensor is cut into tiles of 32 x 32 four-byte words (4 KiB, little-endian, row-major, zero padded), so that a
dispute opens a tile and never a tensor:
  - a tensor whose rank is at least 2 and whose last dimension has at least 32 words is the matrix
    (product of the other dimensions) x (last dimension), padded with zeros to whole tiles;
  - every other tensor is flattened into rows of 32 words: a vector of 1,000 costs one tile, not 32;
  - float32 and int32 elements are one word; an int64 element is two (low first); uint8 and bool elements are
    widened to one word.
Tiles are numbered row by row. The bits of a NaN depend on the processor that made it, so each NaN is hashed as
0x7fc00000; every other value, -0.0 and subnormals included, is hashed as it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.errors import LocalProtocolError, VerificationFailed

__all__ = [
    "EMPTY",
    "Leaf",
    "check_tile",
    "element_at",
    "fold",
    "leaf_hash",
    "levels_over",
    "matrix_shape",
    "merkle_levels",
    "merkle_path",
    "merkle_root",
    "node_hash",
    "path_in",
    "path_length",
    "path_root",
    "path_root_of",
    "state_leaf",
    "state_root",
    "state_root_of",
    "state_root_over",
    "tensor_path",
    "tensor_root",
    "tensor_root_of",
    "tile_count",
    "tile_element",
    "tile_of",
    "tiles",
    "tree_height",
    "verify_path",
    "verify_tile",
]

Leaf = bytes | bytearray | memoryview

_SIDE: Final = params.TILE_SIDE
_TILE_BYTES: Final = 4 * _SIDE * _SIDE
_LEAF: Final = b"ichiba/leaf"
_NODE: Final = b"ichiba/node"
EMPTY: Final = hashlib.blake2b(b"", digest_size=32, person=b"ichiba/empty").digest()
_WORDS: Final = {"float32": 1, "int32": 1, "int64": 2, "uint8": 1, "bool": 1}  # words of 4 bytes per element
_NAN: Final = np.uint32(0x7FC00000)


# --- trees -------------------------------------------------------------------------------------------------
def leaf_hash(leaf: Leaf) -> bytes:
    """The hash of one leaf: 32 bytes."""
    return hashlib.blake2b(leaf, digest_size=32, person=_LEAF).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node over its two children's hashes: 32 bytes."""
    return hashlib.blake2b(left + right, digest_size=32, person=_NODE).digest()


def merkle_levels(leaves: Sequence[Leaf]) -> list[list[bytes]]:
    """All hashes of the tree, leaf hashes first, the root alone in the last level. No leaves: no levels."""
    return levels_over([leaf_hash(leaf) for leaf in leaves])


def levels_over(hashes: Sequence[bytes]) -> list[list[bytes]]:
    """As `merkle_levels`, from the leaf hashes."""
    if not hashes:
        return []
    levels = [list(hashes)]
    while len(levels[-1]) > 1:
        levels.append(fold(levels[-1], 1))
    return levels


def fold(level: Sequence[bytes], levels: int) -> list[bytes]:
    """The hashes that many levels above `level`, whose first hash has an even place at each level that is folded.

    So sixteen hashes side by side fold to the one they stand under, and the fewer at a level's end to theirs.
    """
    found = list(level)
    for _ in range(levels):
        above = [node_hash(found[i], found[i + 1]) for i in range(0, len(found) - 1, 2)]
        if len(found) % 2:
            above.append(found[-1])
        found = above
    return found


def tree_height(count: int) -> int:
    """The levels above the leaf hashes of a tree of `count` leaves: ceil(log2(count))."""
    return max(0, count - 1).bit_length()


def merkle_root(leaves: Sequence[Leaf]) -> bytes:
    """The root over `leaves`, each any bytes (a tile, a checkpoint's root): 32 bytes."""
    levels = merkle_levels(leaves)
    return levels[-1][0] if levels else EMPTY


def merkle_path(leaves: Sequence[Leaf], index: int) -> list[bytes]:
    """The sibling hashes from leaf `index` up to the root; a promoted level contributes none.

    Raises LocalProtocolError if there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise LocalProtocolError(f"leaf {index} of {len(leaves)}")
    return path_in(merkle_levels(leaves), index)


def path_in(levels: Sequence[Sequence[bytes]], index: int) -> list[bytes]:
    """The path of leaf `index` in a tree that `merkle_levels` made: see `merkle_path`."""
    path = []
    for level in levels[:-1]:
        if (sibling := index ^ 1) < len(level):
            path.append(level[sibling])
        index //= 2
    return path


def path_length(index: int, count: int) -> int:
    """How many hashes the path of leaf `index` among `count` has: at most ceil(log2(count))."""
    length = 0
    while count > 1:
        length += (index ^ 1) < count
        index, count = index // 2, (count + 1) // 2
    return length


def verify_path(root: bytes, leaf: Leaf, *, index: int, count: int, path: Sequence[bytes]) -> None:
    """Raise VerificationFailed unless `leaf` is number `index` of the `count` leaves under `root`.

    `count` must come from what both sides agreed (a shape, a number of segments), never from the prover.
    """
    if path_root(leaf, index=index, count=count, path=path) != root:
        raise VerificationFailed(
            f"leaf {index} of {count} is not under root {root.hex()[:12]}", why="its path leads to another root"
        )


def path_root(leaf: Leaf, *, index: int, count: int, path: Sequence[bytes]) -> bytes:
    """The root that `path` leads to from leaf `index` of `count`. Raises VerificationFailed if it is no such path."""
    return path_root_of(leaf_hash(leaf), index=index, count=count, path=path)


def path_root_of(hashed: bytes, *, index: int, count: int, path: Sequence[bytes]) -> bytes:
    """As `path_root`, from the leaf's hash."""
    if not 0 <= index < count:
        raise VerificationFailed(f"leaf {index} is not one of {count}")
    if len(path) != path_length(index, count):
        raise VerificationFailed(
            f"path of {len(path)} hashes, leaf {index} of {count} needs {path_length(index, count)}"
        )
    node, position, width, left_over = hashed, index, count, list(reversed(path))
    while width > 1:
        if (position ^ 1) < width:
            sibling = left_over.pop()
            if len(sibling) != 32:
                raise VerificationFailed(f"path holds a hash of {len(sibling)} bytes")
            node = node_hash(sibling, node) if position % 2 else node_hash(node, sibling)
        position, width = position // 2, (width + 1) // 2
    return node


# --- tensors -----------------------------------------------------------------------------------------------
def matrix_shape(shape: Sequence[int], dtype: str) -> tuple[int, int]:
    """The (rows, columns) in 4-byte words of the matrix that a tensor is hashed as, before padding."""
    if dtype not in _WORDS:
        raise LocalProtocolError(f"a tensor of {dtype} has no root", next_step=f"use one of {sorted(_WORDS)}")
    per_element = _WORDS[dtype]
    total = math.prod(shape) * per_element
    if len(shape) >= 2 and shape[-1] * per_element >= _SIDE:
        return total // (shape[-1] * per_element), shape[-1] * per_element
    return -(-total // _SIDE), _SIDE


def tile_count(shape: Sequence[int], dtype: str) -> int:
    """The number of tiles of a tensor: the count its paths are verified with. An empty tensor has none."""
    rows, columns = matrix_shape(shape, dtype)
    return -(-rows // _SIDE) * -(-columns // _SIDE)


def _as_words(array: NDArray[Any]) -> NDArray[np.uint32]:
    """The elements of `array` as a flat uint32 array of little-endian words; a view if it can be."""
    name = array.dtype.name
    if name in ("uint8", "bool"):
        array = array.astype("<u4")
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    found = flat.view("<u4")
    if name == "float32":
        bad = np.isnan(flat)
        if bad.any():
            found = np.where(bad, _NAN, found)
    return found


def tiles(array: NDArray[Any]) -> list[memoryview]:
    """The tiles of `array`, each 4,096 bytes. Raises LocalProtocolError for a dtype that has no root."""
    rows, columns = matrix_shape(array.shape, array.dtype.name)
    if not array.size:
        return []
    flat = _as_words(array)
    tile_rows, tile_columns = -(-rows // _SIDE), -(-columns // _SIDE)
    padded = (tile_rows * _SIDE, tile_columns * _SIDE)
    if padded == (rows, columns) and flat.size == rows * columns:
        matrix = flat.reshape(padded)
    elif columns == _SIDE:
        matrix = np.zeros(padded, dtype="<u4")
        matrix.reshape(-1)[: flat.size] = flat
    else:
        matrix = np.zeros(padded, dtype="<u4")
        matrix[:rows, :columns] = flat.reshape(rows, columns)
    cut = matrix.reshape(tile_rows, _SIDE, tile_columns, _SIDE).swapaxes(1, 2)
    data = np.ascontiguousarray(cut).data.cast("B")
    return [data[at : at + _TILE_BYTES] for at in range(0, len(data), _TILE_BYTES)]


def tensor_root_of(tree: bytes, *, shape: Sequence[int], dtype: str) -> bytes:
    """The root of a tensor from the root of its tiles: binds dtype and shape. 32 bytes."""
    if dtype not in _WORDS:
        raise LocalProtocolError(f"a tensor of {dtype} has no root", next_step=f"use one of {sorted(_WORDS)}")
    if len(shape) > params.TENSOR_RANK_MAX:
        raise LocalProtocolError(f"a tensor of rank {len(shape)}, at most {params.TENSOR_RANK_MAX}")
    head = dtype.encode().ljust(8, b"\0") + len(shape).to_bytes(8, "little")
    dims = b"".join(int(size).to_bytes(8, "little") for size in shape)
    return hashlib.blake2b(head + dims + tree, digest_size=32, person=b"ichiba/tensor").digest()


def tensor_root(array: NDArray[Any]) -> bytes:
    """The root of one tensor of float32, int32, int64, uint8 or bool: 32 bytes."""
    return tensor_root_of(merkle_root(tiles(array)), shape=array.shape, dtype=array.dtype.name)


def tensor_path(array: NDArray[Any], tile: int) -> tuple[bytes, list[bytes]]:
    """The bytes of one tile and its path, for `verify_tile`. Raises LocalProtocolError if there is no such tile."""
    cut = tiles(array)
    path = merkle_path(cut, tile)
    return bytes(cut[tile]), path


def verify_tile(
    root: bytes, *, tile: int, data: bytes, path: Sequence[bytes], tree: bytes, shape: Sequence[int], dtype: str
) -> None:
    """Raise VerificationFailed unless `data` is tile number `tile` of the tensor whose root is `root`.

    `tree` is the root of the tiles, as the prover states it; `shape` and `dtype` are the agreed ones. Padding
    is checked to be zero and a NaN to be the canonical one, so that one tensor has one root.
    """
    if tensor_root_of(tree, shape=shape, dtype=dtype) != root:
        raise VerificationFailed(f"tile root {tree.hex()[:12]} is not that of tensor {root.hex()[:12]}")
    verify_path(tree, data, index=tile, count=tile_count(shape, dtype), path=path)
    check_tile(data, tile=tile, shape=shape, dtype=dtype)


def check_tile(data: bytes, *, tile: int, shape: Sequence[int], dtype: str) -> None:
    """Raise VerificationFailed unless `data` can be tile number `tile` of such a tensor: its size, its padding zero,
    each NaN the canonical one, each value one that the dtype has."""
    if len(data) != _TILE_BYTES:
        raise VerificationFailed(f"a tile of {len(data)} bytes, not {_TILE_BYTES}")
    rows, columns = matrix_shape(shape, dtype)
    row, column = (_SIDE * at for at in divmod(tile, -(-columns // _SIDE)))
    words = np.frombuffer(data, dtype="<u4").reshape(_SIDE, _SIDE)
    inside = np.zeros((_SIDE, _SIDE), dtype=bool)
    inside[: max(0, rows - row), : max(0, columns - column)] = True
    elements = math.prod(shape) * _WORDS[dtype]
    if rows * columns != elements:  # flattened: the last row is not full
        inside &= (np.arange(row * columns, (row + _SIDE) * columns) < elements).reshape(_SIDE, _SIDE)
    if words[~inside].any():
        raise VerificationFailed(f"padding of tile {tile} is not zero")
    if dtype == "float32" and (((words & 0x7FFFFFFF) > 0x7F800000) & (words != _NAN)).any():
        raise VerificationFailed(f"tile {tile} holds a NaN that is not canonical")
    if dtype in ("uint8", "bool") and (words > (1 if dtype == "bool" else 255)).any():
        raise VerificationFailed(f"tile {tile} holds a value that no {dtype} has")


def tile_of(element: int, *, shape: Sequence[int], dtype: str) -> tuple[int, int]:
    """Where row-major element `element` of a tensor lies: the number of its tile, and its first word in that tile."""
    columns = matrix_shape(shape, dtype)[1]
    row, column = divmod(element * _WORDS[dtype], columns)
    tile = row // _SIDE * -(-columns // _SIDE) + column // _SIDE
    return tile, row % _SIDE * _SIDE + column % _SIDE


def element_at(tile: int, word: int, *, shape: Sequence[int], dtype: str) -> int:
    """The row-major element that word `word` of tile number `tile` belongs to: the inverse of `tile_of`."""
    columns = matrix_shape(shape, dtype)[1]
    row, column = (_SIDE * at for at in divmod(tile, -(-columns // _SIDE)))
    return ((row + word // _SIDE) * columns + column + word % _SIDE) // _WORDS[dtype]


def tile_element(data: bytes, word: int, *, dtype: str) -> int:
    """The element that starts at `word` of a tile, as protocol.reference holds it: bits of a float, else a value."""
    size = 4 * _WORDS[dtype]
    return int.from_bytes(data[4 * word : 4 * word + size], "little", signed=dtype in ("int32", "int64"))


# --- states ------------------------------------------------------------------------------------------------
def state_root_of(roots: Mapping[str, bytes]) -> bytes:
    """The root of a state from its tensors' roots, over the names in code-point order: 32 bytes."""
    leaves = [state_leaf(name, roots[name]) for name in sorted(roots)]
    return state_root_over(merkle_root(leaves), count=len(leaves))


def state_leaf(name: str, root: bytes) -> bytes:
    """One leaf of a state's tree: the tensor `name`, whose root is `root`."""
    encoded = name.encode()
    return len(encoded).to_bytes(8, "little") + encoded + root


def state_root_over(tree: bytes, *, count: int) -> bytes:
    """The root of a state from the root of the tree over its `count` leaves: 32 bytes."""
    return hashlib.blake2b(count.to_bytes(8, "little") + tree, digest_size=32, person=b"ichiba/state").digest()


def state_root(state: Mapping[str, NDArray[Any]]) -> bytes:
    """The root of a state, a tensor for each name: 32 bytes. Raises LocalProtocolError as `tensor_root`."""
    return state_root_of({name: tensor_root(array) for name, array in state.items()})
