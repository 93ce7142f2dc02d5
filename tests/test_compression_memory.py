"""Codecs that remember: both ends of a link stay in step or say so, and outer deltas lose nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.payload_size import payload_bytes
from protocol.stage import Codec
from worker import exact
from worker.compression import (
    NotFinite,
    OutOfStep,
    decode_change,
    decode_outer,
    encode_change,
    encode_outer,
    mean_of,
    outer_step,
    unseen_rows,
)

EXAMPLES, WIDE = 6, (5, 7)
CHANGE2, CHANGE4 = Codec("change", 2), Codec("change", 4)
NO_NOISE = {"seed": 0, "step": 0, "stream": 0}
INT4, SPARSE, WHOLE = Codec("tile", 4), Codec("sparse", 2), Codec("float32")


class End:
    """One end of a link, with its memory."""

    def __init__(self) -> None:
        self.kept, self.seen = torch.zeros(EXAMPLES, *WIDE), torch.zeros(EXAMPLES, dtype=torch.uint8)

    def send(self, x: Tensor, rows: list[int], step: int, codec: Codec = CHANGE4) -> bytes:
        return encode_change(codec, x, kept=self.kept, seen=self.seen, rows=rows, seed=1, step=step, stream=9)

    def take(self, payload: bytes, rows: list[int], step: int, codec: Codec = CHANGE4) -> Tensor:
        return decode_change(codec, payload, kept=self.kept, seen=self.seen, rows=rows, seed=1, step=step, stream=9)

    def is_as(self, other: End) -> bool:
        return torch.equal(self.kept, other.kept) and torch.equal(self.seen, other.seen)


def drawn(step: int, rows: int) -> Tensor:
    return exact.normal(8, step, 0, (rows, *WIDE))


micro_batches = st.lists(st.lists(st.integers(0, EXAMPLES - 1), max_size=5), max_size=12)


@given(micro_batches, st.sampled_from([2, 3, 4, 6, 8]))
@settings(max_examples=150)
def test_both_ends_stay_in_step(batches: list[list[int]], bits: int) -> None:
    sender, receiver, codec = End(), End(), Codec("change", bits)
    for step, rows in enumerate(batches):
        x, before, fresh = drawn(step, len(rows)), sender.kept.clone(), unseen_rows(sender.seen, rows)
        known = [bool(sender.seen[row]) for row in rows]
        payload = sender.send(x, rows, step, codec)
        assert len(payload) == payload_bytes(codec, "float32", x.shape, flow="forward", unseen=fresh)
        assert fresh == unseen_rows(receiver.seen, rows)
        found = receiver.take(payload, rows, step, codec)
        assert receiver.is_as(sender)
        for place, row in enumerate(rows):
            if rows.index(row) == place:
                assert torch.equal(found[place], sender.kept[row])
            if not known[place]:
                assert torch.equal(found[place], x[place].bfloat16().float())
        largest = max((float((x[i] - before[row]).abs().max()) for i, row in enumerate(rows) if known[i]), default=0.0)
        first = [float(x[i].abs().max()) / 256 for i in range(len(rows)) if not known[i]]
        assert not rows or float((found - x).abs().max()) <= max(1.13 * largest / (2**bits - 1) + 1e-6, *first, 0.0)
        assert set(sender.seen.nonzero().flatten().tolist()) == {row for rows in batches[: step + 1] for row in rows}


def test_what_repeats_is_sent_ever_closer() -> None:
    """The point of sending changes: an activation that settles is known to more than the codec's bits."""
    sender, receiver, x = End(), End(), drawn(0, 1)
    errors = []
    for step in range(12):
        y = x + 0.5**step * drawn(step + 1, 1)
        errors.append(float((receiver.take(sender.send(y, [2], step, CHANGE2), [2], step, CHANGE2) - y).abs().max()))
    assert errors[0] <= float((x + drawn(1, 1)).abs().max()) / 256, "half a unit of bfloat16's last place"
    assert errors[-1] < 0.01 * errors[1]


@given(micro_batches.filter(lambda b: len(b) > 2), st.data())
@settings(max_examples=150)
def test_a_lost_doubled_or_changed_payload_never_goes_on_unnoticed(
    batches: list[list[int]], data: st.DataObject
) -> None:
    sender, receiver = End(), End()
    at = data.draw(st.integers(0, len(batches) - 1))
    fault = data.draw(st.sampled_from(["lost", "doubled", "changed", "of other rows", "of another step"]))
    for step, rows in enumerate(batches):
        payload = sender.send(drawn(step, len(rows)), rows, step)
        before = receiver.kept.clone(), receiver.seen.clone()
        try:
            if step == at and fault == "lost":
                continue
            if step == at and fault == "changed":
                place = data.draw(st.integers(0, len(payload) - 1))
                payload = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
            if step == at and fault == "of other rows":
                receiver.take(payload, [(row + 1) % EXAMPLES for row in rows], step)
            elif step == at and fault == "of another step":
                receiver.take(payload, rows, step + 1)
            else:
                receiver.take(payload, rows, step)
            if step == at and fault == "doubled":
                receiver.take(payload, rows, step)
        except (OutOfStep, MalformedRecord):
            if not (step == at and fault == "doubled"):
                assert torch.equal(receiver.kept, before[0])
                assert torch.equal(receiver.seen, before[1])
            return
        # Nothing raised: then this micro-batch, as decoded, is what the sender keeps of it.
        assert all(torch.equal(receiver.kept[row], sender.kept[row]) for row in rows)
        assert not (step == at and fault in ("changed", "of another step"))
        assert not (step == at and fault in ("of other rows", "doubled") and rows)


def test_hostile_change_payloads_are_refused_and_leave_the_memory() -> None:
    sender, receiver = End(), End()
    receiver.take(sender.send(drawn(0, 2), [0, 1], 0), [0, 1], 0)
    rows = [0, 3, 0]
    payload = sender.send(drawn(1, 3), rows, 1)
    kept, seen = receiver.kept.clone(), receiver.seen.clone()
    infinite = payload[:8] + np.float32(math.inf).tobytes() + payload[12:]
    high = payload[: 8 + 4 * 35] + b"\xff\xff" + payload[10 + 4 * 35 :]
    for bad in (b"", payload[:-1], payload + b"\0", infinite, infinite.replace(b"\x80\x7f", b"\xc0\x7f"), high):
        with pytest.raises(MalformedRecord):
            receiver.take(bad, rows, 1)
    with pytest.raises(OutOfStep):
        receiver.take(bytes([payload[0] ^ 1]) + payload[1:], rows, 1)
    assert torch.equal(receiver.kept, kept)
    assert torch.equal(receiver.seen, seen)
    receiver.take(payload, rows, 1)
    assert receiver.is_as(sender)


def test_a_memory_pushed_to_infinity_is_refused() -> None:
    receiver, sender = End(), End()
    for end in (sender, receiver):
        end.kept.fill_(3.0e38)
        end.seen.fill_(1)
    with pytest.raises(NotFinite):
        sender.send(torch.full((1, *WIDE), -3.0e38), [0], 0)
    sender.kept.fill_(0.0)
    with pytest.raises(MalformedRecord, match="infinity"):
        receiver.take(sender.send(torch.full((1, *WIDE), 1.6e38), [0], 0), [0], 0)


def test_what_cannot_be_sent_leaves_the_sender_as_it_was() -> None:
    end = End()
    end.send(drawn(0, 1), [0], 0)
    kept, seen = end.kept.clone(), end.seen.clone()
    odd = torch.full((1, *WIDE), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounds to zero
    for bad, rows in (
        (drawn(1, 2) * math.nan, [0, 1]), (drawn(1, 1) * 3e38, [1]), (drawn(1, 1) * math.inf, [0]), (odd, [1]),
    ):  # fmt: skip
        with pytest.raises(NotFinite):
            end.send(bad, rows, 1)
    for x, rows in ((drawn(1, 2), [0]), (drawn(1, 1), [EXAMPLES]), (drawn(1, 1), [-1]), (drawn(1, 1).int(), [0])):
        with pytest.raises(LocalProtocolError):
            end.send(x, rows, 1)
    end.kept = end.kept.transpose(1, 2)
    with pytest.raises(LocalProtocolError, match="dense"):
        end.send(drawn(1, 1), [0], 1)
    assert torch.equal(end.kept.transpose(1, 2), kept)
    assert torch.equal(end.seen, seen)


SHAPES = [(1,), (31,), (33,), (4096,), (4097,), (64, 64), (90, 100), (0, 3), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "codec", [WHOLE, INT4, Codec("tile", 2), SPARSE], ids=lambda codec: f"{codec.kind}{codec.bits}"
)
def test_what_is_not_sent_of_a_delta_stays(codec: Codec, shape: tuple[int, ...]) -> None:
    residual = torch.zeros(shape)
    owed, had = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for step in range(6):
        delta = exact.normal(3, step, 0, shape) * 2.0 ** (step - 3)
        total = delta + residual
        payload, sent, residual = encode_outer(codec, delta, residual, seed=1, step=step, stream=2)
        assert len(payload) == payload_bytes(codec, "float32", shape, flow="outer")
        assert torch.equal(decode_outer(codec, payload, shape, seed=1, step=step, stream=2), sent)
        assert torch.equal(residual, total - sent)
        owed, had = owed + delta.double(), had + sent.double()
        # Two sums are rounded a step, each to half a unit in the last place of at most 2**5: 2**-20.
        assert not owed.numel() or float((owed - had - residual.double()).abs().max()) <= (step + 1) * 2.0**-19
    assert codec.kind != "float32" or not residual.any()


def test_outer_deltas_are_as_many_times_smaller_as_stated() -> None:
    whole = 4 * 2**20
    assert whole / payload_bytes(INT4, "float32", (2**20,), flow="outer") >= 8.0
    assert whole / payload_bytes(SPARSE, "float32", (2**20,), flow="outer") >= 100.0


@pytest.mark.parametrize("count", [1, 32, 33, 64, 65, 4096, 4097, 9000])
def test_sparse_sends_the_largest_and_of_equal_ones_the_first(count: int) -> None:
    values = exact.normal(4, 0, 0, (count,))
    _, sent, _ = encode_outer(SPARSE, values, torch.zeros(count), **NO_NOISE)
    for first in range(0, count, 4096):
        chunk, got = values[first : first + 4096], sent[first : first + 4096]
        most = -(-len(chunk) // 32)
        expected = torch.zeros(len(chunk), dtype=torch.bool)
        expected[chunk.abs().sort(descending=True, stable=True).indices[:most]] = True
        assert torch.equal(got != 0, expected)
        assert torch.equal(got[expected] > 0, chunk[expected] > 0)
        assert len(got[expected].abs().unique()) <= 2
    _, sent, _ = encode_outer(SPARSE, torch.full((count,), -0.1), torch.zeros(count), **NO_NOISE)
    chosen = (sent != 0).nonzero().flatten() % 4096
    assert int(chosen.max()) < 128
    assert float((sent[sent != 0] + 0.1).abs().max()) < 0.1 / 16


def test_few_or_small_values_are_sent_in_the_end() -> None:
    """Where less is there than may be sent, and of what is never among the largest: error feedback brings all of it."""
    delta = torch.zeros(4096)
    delta[[7, 900, 901, 4095]] = torch.tensor([1.0, -3.0, 0.01, 2e-20])
    residual, total = torch.zeros(4096), torch.zeros(4096)
    for step in range(40):
        _, sent, residual = encode_outer(SPARSE, delta * (step == 0), residual, seed=0, step=step, stream=0)
        total += sent
    assert float((total - delta).abs().max()) < 1e-8
    _, sent, residual = encode_outer(SPARSE, torch.zeros(64), torch.zeros(64), **NO_NOISE)
    assert not sent.any()
    assert not residual.any()


def test_hostile_sparse_payloads_are_refused() -> None:
    count = 4096 + 70  # 128 places, then 3: 27 bits, of which 5 are to spare
    payload, _, _ = encode_outer(SPARSE, exact.normal(4, 0, 0, (count,)), torch.zeros(count), **NO_NOISE)

    def refused(bad: bytes) -> None:
        with pytest.raises(MalformedRecord):
            decode_outer(SPARSE, bad, (count,), **NO_NOISE)

    for bad in (b"", payload[:-1], payload + b"\0"):
        refused(bad)
    refused(b"\xff\xff" + payload[2:])
    refused((254 * 8 - 254).to_bytes(2, "little") + payload[2:])
    refused(payload[:-1] + bytes([payload[-1] | 0x80]))
    unary = 4 + 80  # after the header, the levels and the low bits of the first chunk
    refused(payload[:unary] + bytes(32) + payload[unary + 32 :])
    refused(payload[:unary] + b"\xff" * 32 + payload[unary + 32 :])
    refused(payload[:4] + bytes(80) + b"\xff" * 16 + bytes(16) + payload[unary + 32 :])  # 128 places, all 0
    tail = bytearray(payload)
    tail[-4:] = (0b111_1000 << 15 | 31 << 10).to_bytes(4, "little")  # the last of three places is 95, of 70 values
    refused(bytes(tail))
    largest = decode_outer(
        SPARSE, (254 * 8 - 255).to_bytes(2, "little") + b"\xff\xff" + payload[4:], (count,), **NO_NOISE
    )
    assert bool(largest.isfinite().all())


@given(st.binary(min_size=9, max_size=9))
@settings(max_examples=300)
def test_any_sparse_bytes_are_refused_or_name_three_places(payload: bytes) -> None:
    assert payload_bytes(SPARSE, "float32", (90,), flow="outer") == 8
    try:
        values = decode_outer(SPARSE, payload[:8], (90,), **NO_NOISE)
    except MalformedRecord:
        return
    assert int((values != 0).sum()) <= 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3.0e38])
def test_outer_deltas_that_are_not_finite_are_refused(bad: float) -> None:
    for codec in (WHOLE, INT4, SPARSE):
        with pytest.raises(NotFinite):
            encode_outer(codec, torch.full((40,), bad), torch.full((40,), bad), **NO_NOISE)
    with pytest.raises(MalformedRecord):
        decode_outer(WHOLE, np.float32([math.nan]).tobytes(), (1,), **NO_NOISE)
    with pytest.raises(LocalProtocolError):
        encode_outer(CHANGE4, torch.ones(3), torch.zeros(3), **NO_NOISE)
    with pytest.raises(LocalProtocolError):
        encode_outer(INT4, torch.ones(3), torch.zeros(4), **NO_NOISE)


def test_the_outer_step_is_that_of_sgd_with_nesterov_momentum() -> None:
    weight = torch.nn.Parameter(exact.normal(6, 0, 0, (200,)))
    optimizer = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    mine, momentum = weight.detach().clone(), torch.zeros(200)
    for step in range(1, 6):
        delta = exact.normal(6, step, 0, (200,)) * 0.1
        weight.grad = -delta
        optimizer.step()
        mine, momentum = outer_step(mine, delta, momentum, 0.7, 0.9)
        torch.testing.assert_close(mine, weight.detach(), rtol=1e-6, atol=1e-6)


def test_the_outer_step_rounds_each_operation_by_itself() -> None:
    start, delta, momentum = (exact.normal(7, 0, i, (1001,)) for i in range(3))
    after = momentum.numpy() * np.float32(0.9) + delta.numpy()
    expected = start.numpy() + (after * np.float32(0.9) + delta.numpy()) * np.float32(0.7)
    found, kept = outer_step(start, delta, momentum, 0.7, 0.9)
    assert np.array_equal(found.numpy(), expected)
    assert np.array_equal(kept.numpy(), after)


def test_a_mean_is_taken_in_order() -> None:
    tensors = [torch.tensor([1e8, 1.0]), torch.tensor([-1e8, 2.0]), torch.tensor([1.0, 4.0])]
    third = float(np.float32(1) / np.float32(3))
    assert mean_of(tensors).tolist() == [third, float(np.float32(7) / np.float32(3))]
    assert mean_of(tensors[::-1]).tolist()[0] == 0.0
    assert tensors[0].tolist() == [1e8, 1.0]
    for bad in ([], [torch.ones(2), torch.ones(3)], [torch.ones(2).double()]):
        with pytest.raises(LocalProtocolError):
            mean_of(bad)
