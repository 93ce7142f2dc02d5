"""Checkpoints from strangers: what is right is read without a copy, and all else is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import merkle, params
from protocol import safetensors as ours
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord, RemoteProtocolError
from worker import checkpoint

STATE = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.step": np.array(7, dtype=np.int64),
    "a.mask": np.array([True, False]),
    "c.empty": np.zeros((0, 4), dtype=np.float32),
    "ü": np.array([1, 2], dtype=np.uint8),
}


def packed(header: Any, body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_is_written_is_read_back_as_views_of_the_buffer() -> None:
    data = ours.write(STATE)
    read = ours.parse(data, ours.layout_of(STATE))
    assert list(read) == sorted(STATE)
    for name, array in STATE.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)
        assert not read[name].flags.writeable
        assert not array.size or not read[name].flags.owndata


def test_the_bytes_do_not_depend_on_the_order_of_names_or_of_memory() -> None:
    turned = {name: array.copy(order="F") for name, array in reversed(STATE.items())}
    assert ours.write(turned) == ours.write(STATE)


def test_the_safetensors_library_reads_ours_and_we_read_its() -> None:
    theirs = safetensors.numpy.load(ours.write(STATE))
    assert all(np.array_equal(theirs[name], STATE[name]) for name in STATE)
    read = ours.parse(safetensors.numpy.save(dict(STATE), metadata={"format": "np"}), ours.layout_of(STATE))
    assert all(np.array_equal(read[name], STATE[name]) for name in STATE)


BODY = np.array([1.0, 2.0], np.float32).tobytes()
REFUSED = {
    "empty": b"",
    "short": b"\x10\0\0",
    "header beyond the file": (100).to_bytes(8, "little") + b"{}",
    "no JSON": packed(b"{'a': 1}"),
    "no UTF-8": packed(b'{"\xff": 1}'),
    "no object": packed([1]),
    "deep": packed(b"[" * 100_000),
    "name twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), BODY),
    "key twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', BODY),
    "NaN": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', BODY),
    "fraction": packed(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', BODY),
    "long number": packed(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), BODY),
    "negative": packed({"a": entry(shape=(-2,), offsets=(0, 8))}, BODY),
    "true as a size": packed({"a": entry(shape=(True, 2))}, BODY),
    "unknown dtype": packed({"a": entry("F64", (1,))}, BODY),
    "dtype no text": packed({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, BODY),
    "missing key": packed({"a": {"dtype": "F32", "shape": [2]}}, BODY),
    "extra key": packed({"a": {**entry(), "more": 1}}, BODY),
    "entry no object": packed({"a": 3}, BODY),
    "three offsets": packed({"a": entry(offsets=(0, 4, 8))}, BODY),
    "size against offsets": packed({"a": entry(shape=(1,))}, BODY),
    "gap at the start": packed({"a": entry(shape=(1,), offsets=(4, 8))}, BODY),
    "gap between": packed({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(8, 12))}, BODY * 2),
    "overlap": packed({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, BODY),
    "same bytes twice": packed({"a": entry(), "b": entry()}, BODY),
    "beyond the end": packed({"a": entry(shape=(4,), offsets=(0, 16))}, BODY),
    "trailing bytes": packed({"a": entry()}, BODY + b"\0"),
    "rank": packed({"a": entry(shape=(1,) * 9 + (2,))}, BODY),
    "elements": packed({"a": entry(shape=(2**40, 2), offsets=(0, 2**43))}, BODY),
    "bool of 2": packed({"a": entry("BOOL", (1,), (0, 1))}, b"\x02"),
    "metadata no strings": packed({"__metadata__": {"a": 1}}),
    "metadata no object": packed({"__metadata__": 3}),
    "long name": packed({"n" * 2000: entry()}, BODY),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_malformed_files_are_refused(data: bytes) -> None:
    with pytest.raises((MalformedRecord, LimitExceeded)):
        ours.parse(data)


def test_an_oversize_header_is_refused_before_it_is_read() -> None:
    with pytest.raises(LimitExceeded):
        ours.parse((params.SAFETENSORS_HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"a": ("float32", (3,))},
        {"a": ("int32", (2,))},
        {"a": ("float32", (2, 1))},
        {"b": ("float32", (2,))},
        {"a": ("float32", (2,)), "b": ("float32", ())},
    ],
)
def test_anything_that_differs_from_the_layout_is_refused(layout: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    data = packed({"a": entry()}, BODY)
    ours.parse(data, {"a": ("float32", (2,))})
    with pytest.raises(MalformedRecord):
        ours.parse(data, layout)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_give_arrays_or_a_typed_error(data: st.DataObject) -> None:
    whole = bytearray(ours.write(STATE))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 400)))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    try:
        read = ours.parse(cut)
    except RemoteProtocolError:
        return
    assert sum(array.nbytes for array in read.values()) <= len(cut)


@pytest.mark.parametrize(
    "bad", [{"a": np.zeros(2)}, {"__metadata__": np.zeros(2, np.float32)}, {"x" * 2000: np.zeros(2, np.float32)}]
)
def test_we_never_write_what_we_would_not_read(bad: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        ours.write(bad)


def test_tensors_survive_and_keep_their_root() -> None:
    state = {name: torch.from_numpy(array.copy()) for name, array in STATE.items()}
    state["turned"] = torch.arange(12, dtype=torch.float32).reshape(3, 4).t()
    data = checkpoint.dump(state)
    loaded = checkpoint.load(data, checkpoint.layout_of(state))
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    loaded["b.weight"][0, 0] = 9.0  # memory of its own
    assert checkpoint.state_root(checkpoint.load(data)) == checkpoint.state_root(state)
    assert checkpoint.state_root(state) == merkle.state_root({name: t.numpy() for name, t in state.items()})
    assert checkpoint.state_root(loaded) != checkpoint.state_root(state)


def test_a_parameter_that_needs_gradients_is_dumped_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(checkpoint.load(checkpoint.dump({"w": weight}))["w"], torch.ones(3))
