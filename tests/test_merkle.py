"""Roots bind a state to its last bit, and a path opens one tile and nothing else."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import merkle
from protocol.errors import LocalProtocolError, VerificationFailed


def slow_root(leaves: list[bytes]) -> bytes:
    """The tree of the specification, level by level."""
    level = [hashlib.blake2b(leaf, digest_size=32, person=b"ichiba/leaf").digest() for leaf in leaves]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [
            pair[0]
            if len(pair) == 1
            else hashlib.blake2b(pair[0] + pair[1], digest_size=32, person=b"ichiba/node").digest()
            for pair in pairs
        ]
    return level[0]


def slow_tiles(matrix: list[list[bytes]], columns: int) -> list[bytes]:
    """Tiles of a matrix of 4-byte words, word by word."""
    zero = b"\0" * 4
    found = []
    for top in range(0, len(matrix), 32):
        for left in range(0, columns, 32):
            words = [
                matrix[r][c] if r < len(matrix) and c < len(matrix[r]) else zero
                for r in range(top, top + 32)
                for c in range(left, left + 32)
            ]
            found.append(b"".join(words))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 33])
def test_the_root_is_the_specified_tree_and_every_path_opens_it(count: int) -> None:
    leaves = [bytes([i]) * (i + 1) for i in range(count)]
    root = merkle.merkle_root(leaves)
    assert root == slow_root(leaves)
    for index in range(count):
        path = merkle.merkle_path(leaves, index)
        assert len(path) == merkle.path_length(index, count) <= (count - 1).bit_length()
        merkle.verify_path(root, leaves[index], index=index, count=count, path=path)


@given(
    count=st.integers(1, 20),
    data=st.data(),
    what=st.sampled_from(["leaf", "index", "path", "shorter", "longer", "root", "count"]),
)
@settings(max_examples=150, deadline=None)
def test_a_path_with_anything_changed_is_refused(count: int, data: st.DataObject, what: str) -> None:
    leaves = [bytes([i, 7]) for i in range(count)]
    index = data.draw(st.integers(0, count - 1))
    root, path, leaf, shown, size = (
        merkle.merkle_root(leaves),
        merkle.merkle_path(leaves, index),
        leaves[index],
        index,
        count,
    )
    if what == "leaf":
        leaf = leaf + b"\0"
    elif what == "index":
        shown = data.draw(st.integers(-3, 2 * count + 3).filter(lambda i: i != index))
    elif what == "path":
        if not path:
            return
        at = data.draw(st.integers(0, len(path) - 1))
        path[at] = bytes([path[at][0] ^ 1]) + path[at][1:]
    elif what == "shorter":
        if not path:
            return
        path.pop()
    elif what == "longer":
        path.append(b"\0" * 32)
    elif what == "root":
        root = bytes([root[0] ^ 1]) + root[1:]
    else:
        # A wrong count is caught whenever it changes the shape of the path.
        size = data.draw(st.integers(0, 40))
        if size > index and merkle.path_length(index, size) == len(path):
            return
    with pytest.raises(VerificationFailed):
        merkle.verify_path(root, leaf, index=shown, count=size, path=path)


def test_a_leaf_cannot_pose_as_an_inner_node_nor_a_list_as_another() -> None:
    a, b = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert merkle.merkle_root([b"a", b"b"]) != merkle.leaf_hash(a + b)
    assert merkle.merkle_root([b"a", b"b", b"c"]) != merkle.merkle_root([b"a", b"b", b"c", b"c"])
    assert merkle.merkle_root([]) not in (merkle.merkle_root([b""]), b"\0" * 32)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_path_of_hashes_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(VerificationFailed):
        merkle.verify_path(merkle.merkle_root([b"a", b"b"]), b"a", index=0, count=2, path=[b"x" * size])


@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (70, 65), (3, 5, 33), (2, 32, 32), (1, 100)], ids=str)
def test_a_matrix_is_tiled_32_by_32_row_by_row(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = [[struct.pack("<f", value) for value in row] for row in array.reshape(-1, shape[-1])]
    expected = slow_tiles(rows, shape[-1])
    assert [bytes(tile) for tile in merkle.tiles(array)] == expected
    assert merkle.tile_count(shape, "float32") == len(expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "code"),
    [
        ((1000,), "float32", "<f"),
        ((64, 9), "float32", "<f"),
        ((8, 4, 3, 3), "float32", "<f"),
        ((), "float32", "<f"),
        ((70,), "int64", "<q"),
        ((5, 7), "int32", "<i"),
        ((40, 3), "uint8", "<I"),
        ((9,), "bool", "<I"),
    ],
)
def test_what_is_narrower_than_a_tile_is_flattened(shape: tuple[int, ...], dtype: str, code: str) -> None:
    array = np.random.default_rng(1).integers(0, 2, size=shape).astype(dtype)
    data = b"".join(struct.pack(code, value) for value in array.reshape(-1).tolist())
    padded = data + b"\0" * (-len(data) % 4096)
    assert b"".join(bytes(tile) for tile in merkle.tiles(array)) == padded
    assert merkle.tile_count(shape, dtype) == len(padded) // 4096


def test_int64_columns_are_two_words_low_first() -> None:
    array = np.arange(2 * 16, dtype=np.int64).reshape(2, 16) - 5
    (tile,) = merkle.tiles(array)
    assert bytes(tile)[:128] == array[0].tobytes()
    assert bytes(tile)[128:256] == array[1].tobytes()


@pytest.mark.parametrize("strided", [False, True])
def test_every_tile_opens_under_the_tensor_root(strided: bool) -> None:
    array = np.random.default_rng(2).normal(size=(65, 50)).astype(np.float32)
    if strided:
        array = array.T
    root, tree = merkle.tensor_root(array), merkle.merkle_root(merkle.tiles(array))
    for tile in range(merkle.tile_count(array.shape, "float32")):
        data, path = merkle.tensor_path(array, tile)
        merkle.verify_tile(root, tile=tile, data=data, path=path, tree=tree, shape=array.shape, dtype="float32")
    assert merkle.tensor_root(np.ascontiguousarray(array)) == root


def opened(array: np.ndarray, tile: int, change: int, word: bytes) -> None:
    """Open a tensor whose tile has `word` written at byte `change`, as a dishonest prover would."""
    cut = [bytes(t) for t in merkle.tiles(array)]
    cut[tile] = cut[tile][:change] + word + cut[tile][change + len(word) :]
    tree = merkle.merkle_root(cut)
    root = merkle.tensor_root_of(tree, shape=array.shape, dtype=array.dtype.name)
    merkle.verify_tile(
        root,
        tile=tile,
        data=cut[tile],
        path=merkle.merkle_path(cut, tile),
        tree=tree,
        shape=array.shape,
        dtype=array.dtype.name,
    )


def test_padding_must_be_zero_and_values_must_be_canonical() -> None:
    matrix, vector = np.ones((40, 40), np.float32), np.ones(1000, np.float32)
    one = struct.pack("<f", 1.0)
    opened(matrix, 1, 0, struct.pack("<f", -0.0))
    opened(matrix, 3, 4 * (32 * 7 + 7), one)  # the last element inside
    opened(vector, 0, 4 * 999, one)
    opened(vector, 0, 0, struct.pack("<I", 0x7FC00000))
    for array, tile, at in [(matrix, 1, 4 * 8), (matrix, 2, 4 * 32 * 8), (vector, 0, 4 * 1000)]:
        with pytest.raises(VerificationFailed, match="padding"):
            opened(array, tile, at, one)
    with pytest.raises(VerificationFailed, match="NaN"):
        opened(vector, 0, 0, struct.pack("<I", 0xFFC00000))
    with pytest.raises(VerificationFailed, match="bool"):
        opened(np.ones(3, bool), 0, 0, struct.pack("<I", 2))


def test_dtype_shape_name_and_every_bit_are_bound() -> None:
    base = np.zeros((64, 32), np.float32)
    roots = {
        merkle.tensor_root(base),
        merkle.tensor_root(base.astype(np.int32)),
        merkle.tensor_root(base.reshape(32, 64)),
        merkle.tensor_root(base.reshape(64, 32, 1)),
        merkle.tensor_root(base.reshape(-1)),
    }
    assert len(roots) == 5
    changed = base.copy()
    changed[63, 31] = -0.0
    assert merkle.tensor_root(changed) not in roots
    one = np.ones(3, np.float32)
    states = [{"a": one}, {"b": one}, {"a": one, "b": one}, {}, {"a": 2 * one}, {"": one}]
    assert len({merkle.state_root(state) for state in states}) == len(states)
    assert merkle.state_root({"a": one, "b": 2 * one}) == merkle.state_root({"b": 2 * one, "a": one})
    assert merkle.state_root({"a": one, "b": 2 * one}) != merkle.state_root({"a": 2 * one, "b": one})


def test_every_nan_has_one_root_whatever_processor_made_it() -> None:
    patterns = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], dtype=np.uint32)
    assert len({merkle.tensor_root(patterns[i : i + 1].view(np.float32)) for i in range(3)}) == 1
    assert patterns[1] == 0xFFC00000  # the operand is left as it was


def test_a_dtype_without_a_root_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        merkle.tensor_root(np.zeros(3))
    with pytest.raises(LocalProtocolError):
        merkle.tensor_path(np.zeros(3, np.float32), 1)


def test_the_root_of_a_known_state_never_changes() -> None:
    state = {"weight": np.arange(70 * 40, dtype=np.float32).reshape(70, 40), "step": np.array(3, dtype=np.int64)}
    assert merkle.state_root(state).hex() == "aa5e3139bc471c0f0a052e86619a4796376d4eb9bd968d67e1b985fcb60ba2e5"
