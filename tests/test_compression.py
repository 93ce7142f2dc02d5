"""Tensors on the wire: the same bytes everywhere, unbiased, within their bound, and hostile payloads refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.operations import ITEM_BYTES
from protocol.payload_size import (
    OUTER_FOUR_BITS,
    TileForm,
    noise_key,
    payload_bytes,
    stream_number,
    tile_bytes,
    tile_form,
)
from protocol.stage import Codec
from worker import exact
from worker.compression import NotFinite, decode, encode
from worker.compression.compiled import has_tiles
from worker.compression.tiles import base_max, pack_tiles, unpack_tiles

FORMS = [tile_form(bits, "forward") for bits in (2, 3, 4, 6, 8)] + [OUTER_FOUR_BITS]
COUNTS = [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 70_003]
TILE4 = Codec("tile", 4)


def wild(count: int) -> np.ndarray:
    """Every exponent that travels, both signs, subnormals, zeros of both signs; neighbours far apart and close."""
    bits = np.linspace(0, 0x7EFFFFFF, count, dtype=np.int64).astype(np.uint32)
    values = bits.view(np.float32) * np.where(np.arange(count) % 3, 1, -1).astype(np.float32)
    values[::7] = -0.0
    return values


def kinds_of_values(count: int) -> dict[str, np.ndarray]:
    normal = exact.normal(5, 0, 0, (count,)).numpy()
    spread = exact.uniform(5, 0, 1, (count,)).numpy() * 200 - 120
    largest = np.nextafter(np.float32(2.0**127), np.float32(0))
    return {
        "normal": normal,
        "every exponent": wild(count),
        "mixed exponents": wild(count)[np.argsort(normal, kind="stable")],
        "steep": (normal * np.exp2(np.rint(spread))).astype(np.float32),
        "subnormal": normal * np.float32(1e-42),
        "least": np.where(normal > 0, np.float32(2.0**-149), np.float32(-0.0)),
        "largest": np.where(normal > 0, largest, -largest),
        "zeros": normal * np.float32(-0.0),
        "a zero tile": np.where(np.arange(count) // 32 % 2, normal, np.float32(0.0)),
        "on the levels": np.rint(normal * 4) * 2 + 1,
        "equal": np.full(count, np.float32(0.1)),
        "just above a scale": np.full(count, np.nextafter(np.float32(255.0), np.float32(256.0))),
    }


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_the_compiled_tiles_are_built_where_there_is_a_compiler() -> None:
    assert has_tiles() or shutil.which("cc") is None, "run setup.sh: a C compiler is here, the compiled tiles are not"


@pytest.mark.skipif(not has_tiles(), reason="no C compiler: the compiled tiles were not built, and nothing needs them")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_compiled_and_plain_tiles_are_the_same_bytes(form: TileForm, threads: None) -> None:
    for count in COUNTS:
        for name, values in kinds_of_values(count).items():
            for key, step in ((0, 0), (2**64 - 1, 2**63 + 5)):
                plain = pack_tiles(values, form, key=key, step=step, helper=False)
                assert pack_tiles(values, form, key=key, step=step) == plain, (name, count)
                assert len(plain) == tile_bytes(form, count)
            found, expected = (
                unpack_tiles(plain, form, count, key=key, step=step),
                unpack_tiles(plain, form, count, key=key, step=step, helper=False),
            )
            assert np.array_equal(found.view(np.int32), expected.view(np.int32)), (name, count)


@pytest.mark.parametrize("helper", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_tile_decodes_to_within_half_a_step(form: TileForm, helper: bool) -> None:
    for count in (1, 33, 1000, 70_003):
        for name, values in kinds_of_values(count).items():
            payload = pack_tiles(values, form, key=9, step=4, helper=helper)
            found = unpack_tiles(payload, form, count, key=9, step=4, helper=helper)
            assert bool(np.isfinite(found).all())
            padded = np.zeros(-(-count // 32) * 32, dtype=np.float32)
            padded[:count] = np.abs(values)
            peaks = np.repeat(padded.reshape(-1, 32).max(axis=1), 32)[:count].astype(np.float64)
            # A tile below the 32 octaves of one byte has the least scale of the tensor; no scale is below 2**-129.
            scales = np.maximum(peaks * 1.1251 / (form.levels - 1), 2.0**-129)
            scales = np.where(peaks > 0, np.maximum(scales, scales.max() * 2.0**-31), 0.0)
            error = np.abs(found.astype(np.float64) - values)
            assert bool((error <= 1.0001 * scales).all()), name
            assert bool((found[peaks == 0] == 0).all())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounding_is_unbiased(form: TileForm) -> None:
    """The error is uniform over a step, whatever the value: over 4,000 draws of the noise its mean lies within 5.5
    standard deviations and the stated bias, its deviation is 1 / sqrt(12) of a step."""
    values, draws = exact.normal(11, 0, 0, (64,)).numpy(), 4000
    values[3], values[40] = 0.0, 1e-5
    key = noise_key(3, 1)
    found = np.stack(
        [unpack_tiles(pack_tiles(values, form, key=key, step=i), form, 64, key=key, step=i) for i in range(draws)]
    )
    step = 2 * np.abs(values).reshape(2, 32).max(axis=1).repeat(32) * 1.125 / (form.levels - 1)
    error = found.astype(np.float64).mean(axis=0) - values
    bound = 5.5 * step / math.sqrt(12 * draws) + step * 2.0**-16
    assert bool((np.abs(error) <= bound).all())
    assert bool((found.std(axis=0) <= step / math.sqrt(12) * 1.05).all())
    assert bool((found.std(axis=0) >= step / 1.125 / math.sqrt(12) * 0.95).all())
    # Rounded to nearest, the same values would miss by more than that: the test can fail.
    nearest = np.rint(values / step + (form.levels - 1) / 2) - (form.levels - 1) / 2
    assert float(np.abs(nearest * step - values).max()) > float(bound.max())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_same_arguments_give_the_same_bytes_and_others_give_others(bits: int, threads: None) -> None:
    x, codec = exact.normal(1, 0, 0, (50, 77)), Codec("tile", bits)
    sent = encode(codec, x, seed=3, step=5, stream=stream_number("forward", 1, 2, 3))
    assert sent == encode(codec, x.t().contiguous().t(), seed=3, step=5, stream=stream_number("forward", 1, 2, 3))
    others = {
        encode(codec, x, seed=s, step=t, stream=n) for s, t, n in ((4, 5, 7), (3, 6, 7), (3, 5, 8), (3, 5, 2**40))
    }
    assert len(others | {sent}) == 5
    place = {"seed": 3, "step": 5, "stream": stream_number("forward", 1, 2, 3)}
    found = decode(codec, memoryview(sent), "float32", x.shape, **place)
    assert torch.equal(decode(codec, sent, "float32", x.shape, **place), found)
    assert not torch.equal(decode(codec, sent, "float32", x.shape, **(place | {"step": 6})), found)


def test_known_bytes() -> None:
    """A change of any bit of the format fails here, whichever machine made it."""
    from protocol.codec import blake

    x = exact.normal(2, 0, 0, (300,))
    sent = [encode(Codec("tile", bits), x, seed=1, step=2, stream=3) for bits in (2, 3, 4, 6, 8)]
    sent.append(pack_tiles(x.numpy(), OUTER_FOUR_BITS, key=noise_key(1, 3), step=2))
    assert [len(one) for one in sent] == [87, 125, 162, 237, 312, 150]
    assert blake("test", *sent).hex() == "f3338423b1616c9fd2b0f4a4fd8f81cea13a2792bd43cacfdf298228738e9900"
    place, told = (
        {"seed": 1, "step": 2, "stream": 3},
        "3adb0980f26959812f19949f35d8d31e64cfd60002ecfaab69a5abdb2e2cccd3",
    )
    found = [
        decode(Codec("tile", bits), one, "float32", (300,), **place)
        for bits, one in zip((2, 3, 4, 6, 8), sent[:5], strict=True)
    ]
    assert blake("test", *(one.numpy().astype("<f4").tobytes() for one in found)).hex() == told


def test_the_wire_is_as_many_times_smaller_as_stated() -> None:
    shape, whole = (32, 64, 128), 2 * 4 * 32 * 64 * 128

    def both(forward: int, backward: int) -> float:
        return whole / sum(
            len(encode(Codec("tile", bits), torch.ones(shape), seed=0, step=0, stream=0))
            for bits in (forward, backward)
        )

    assert both(4, 8) >= 5.0
    assert both(2, 4) >= 7.5


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 3)], ids=str)
def test_other_dtypes_and_whole_tensors_travel_as_they_are(dtype: str, shape: tuple[int, ...]) -> None:
    x = (exact.normal(1, 0, 0, shape) * 100).to(getattr(torch, dtype))
    for codec in (Codec("float32"), TILE4) if dtype != "float32" else (Codec("float32"),):
        sent = encode(codec, x, seed=0, step=0, stream=0)
        assert len(sent) == payload_bytes(codec, dtype, shape, flow="forward")
        found = decode(codec, sent, dtype, shape, seed=0, step=0, stream=0)
        assert found.dtype == x.dtype
        assert torch.equal(found, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127, -3.4e38])
@pytest.mark.parametrize("helper", [False, True], ids=["plain", "compiled"])
def test_what_is_not_finite_is_refused(bad: float, helper: bool) -> None:
    for place in (0, 40, 129):
        values = np.ones(130, dtype=np.float32)
        values[place] = bad
        with pytest.raises(NotFinite):
            pack_tiles(values, FORMS[0], key=0, step=0, helper=helper)


def test_calls_out_of_range_are_refused() -> None:
    x = torch.ones(3)
    for arguments in ({"seed": -1}, {"seed": 2**64}, {"step": 2**64}, {"stream": -1}):
        with pytest.raises(LocalProtocolError):
            encode(TILE4, x, **({"seed": 0, "step": 0, "stream": 0} | arguments))
    with pytest.raises(LocalProtocolError):
        encode(Codec("change", 4), x, seed=0, step=0, stream=0)
    for place in ((256, 0, 0), (0, 256, 0), (0, 0, 2**24), (-1, 0, 0)):
        with pytest.raises(LocalProtocolError):
            stream_number("forward", *place)
    with pytest.raises(LocalProtocolError):
        payload_bytes(TILE4, "float64", (3,), flow="forward")


@pytest.mark.parametrize("helper", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hostile_tile_payloads_are_refused(form: TileForm, helper: bool) -> None:
    count = 70  # the last tile is short, the last byte of most forms has bits to spare
    values = exact.normal(7, 0, 0, (count,)).numpy()
    values[32:64] = 0.0
    good = pack_tiles(values, form, key=1, step=1, helper=helper)

    def refused(payload: bytes) -> None:
        with pytest.raises(MalformedRecord):
            unpack_tiles(payload, form, count, key=1, step=1, helper=helper)

    unpack_tiles(good, form, count, key=1, step=1, helper=helper)
    for payload in (b"", good[:-1], good + b"\0", good * 2):
        refused(payload)
    refused(
        (base_max(form.levels) + 1).to_bytes(2, "little") + good[2:]
    )  # a scale of infinity or NaN has no other way in
    refused(b"\xff\xff" + good[2:])
    codes = bytearray(good)
    codes[5 + form.code_bytes(32) + 1] ^= 1  # of the tile of zeros
    refused(bytes(codes))
    if form.code_bytes(count) * 8 > -(-count // form.group) * form.group_bits or form.group > 1:
        refused(good[:-1] + bytes([good[-1] | 0x80]))
    if form.group > 1:
        refused(good[:5] + b"\xff" * 4 + good[9:])  # 2**29 - 1 is no number of eight codes
    values[32:64] = 1.0
    good = pack_tiles(values, form, key=1, step=1, helper=helper)
    highest = unpack_tiles(
        base_max(form.levels).to_bytes(2, "little") + b"\xff" * 3 + good[5:], form, count, key=1, step=1, helper=helper
    )
    assert bool(np.isfinite(highest).all())


@given(st.binary(max_size=60), st.sampled_from(FORMS), st.integers(0, 70))
@settings(max_examples=300)
def test_any_bytes_are_refused_or_decode_alike(payload: bytes, form: TileForm, count: int) -> None:
    found: list[object] = []
    payload = payload if len(payload) % 2 else payload[: tile_bytes(form, count)].ljust(tile_bytes(form, count), b"\0")
    for helper in (False, True):
        try:
            found.append(unpack_tiles(payload, form, count, key=7, step=8, helper=helper).tobytes())
        except MalformedRecord:
            found.append(None)
    assert found[0] == found[1]


def test_a_bool_that_is_neither_is_refused() -> None:
    with pytest.raises(MalformedRecord):
        decode(Codec("float32"), b"\0\1\2", "bool", (3,), seed=0, step=0, stream=0)


@given(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.sampled_from([2, 3, 4, 6, 8]))
def test_the_size_is_of_the_shape_alone(shape: tuple[int, ...], bits: int) -> None:
    for x in (torch.zeros(shape), torch.ones(shape), exact.normal(1, 0, 0, shape)):
        sent = encode(Codec("tile", bits), x, seed=0, step=0, stream=0)
        assert len(sent) == payload_bytes(Codec("tile", bits), "float32", shape, flow="backward")
        found: Tensor = decode(Codec("tile", bits), sent, "float32", shape, seed=0, step=0, stream=0)
        assert found.shape == x.shape
