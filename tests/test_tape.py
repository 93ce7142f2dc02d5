"""Payloads and tapes: keys agree at both ends of a link, a tape is read as it was written or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import params
from protocol.blob import blob_id, manifest_of
from protocol.errors import LimitExceeded, MalformedRecord
from protocol.operations import TensorType
from protocol.payload import LinkHash, PayloadKey, payload_bytes_max, payload_digest, received_key, receivers, sent_key
from protocol.stage import Codec, Crossing, Stage
from protocol.tape import ENTRY_HEAD_BYTES_MAX, TapeHash, TapeReader, entry_head, whole_entries

RAW = Codec("float32")
KEYS = st.builds(
    PayloadKey,
    step=st.integers(0, 2**40),
    flow=st.sampled_from(["forward", "backward", "sync", "outer"]),
    micro_batch=st.integers(0, params.MICRO_BATCHES_MAX),
    index=st.integers(0, params.PROGRAM_INPUTS_MAX),
    unit=st.integers(0, params.PARALLEL_UNITS_MAX),
)
ENTRIES = st.lists(st.tuples(KEYS, st.binary(max_size=200)), max_size=6)


def unit(stage: int, replica: int) -> Stage:
    return Stage(
        run=bytes(32), stage=stage, stages=3, replica=replica, replicas=2, micro_batches=2,
        forward=RAW, backward=RAW, sync="step", shared=RAW,
    )  # fmt: skip


def tape_of(entries: list[tuple[PayloadKey, bytes]]) -> bytes:
    return b"".join(entry_head(key, payload) + payload for key, payload in entries)


@pytest.mark.parametrize(
    ("sender", "receiver", "flow", "from_replica"),
    [((1, 1), (2, 1), "forward", 1), ((1, 0), (0, 0), "backward", 0), ((1, 0), (1, 1), "sync", 0)],
)
def test_both_ends_of_a_link_know_a_payload_by_one_key(
    sender: tuple[int, int], receiver: tuple[int, int], flow: str, from_replica: int
) -> None:
    one, other = unit(*sender), unit(*receiver)
    out = Crossing(flow, sender[1], 1, 4, 9)  # type: ignore[arg-type]
    into = Crossing(flow, from_replica, 1, 4, 3)  # type: ignore[arg-type]
    assert sent_key(one, out, 7) == received_key(other, into, 7)
    assert other.unit in receivers(one, flow)  # type: ignore[arg-type]
    assert one.unit not in receivers(one, flow)  # type: ignore[arg-type]


def test_a_payload_is_bounded_by_its_tensor_and_a_tensor_by_the_limit() -> None:
    kind = TensorType("float32", (10, 10))
    assert payload_bytes_max(kind, RAW, "forward") == 400
    assert payload_bytes_max(kind, Codec("tile", 4), "forward") == 2 + 4 + 50
    assert payload_bytes_max(kind, Codec("change", 2), "forward") > 400
    with pytest.raises(LimitExceeded):
        payload_bytes_max(TensorType("float32", (params.CROSSING_BYTES_MAX,)), RAW, "sync")


@given(st.lists(st.tuples(KEYS, st.binary(max_size=8)), max_size=6, unique_by=lambda item: item[0]), st.randoms())
def test_the_hash_of_a_link_is_the_same_in_any_order_within_a_step(items: list[tuple[PayloadKey, bytes]], rng) -> None:  # type: ignore[no-untyped-def]
    one, other = LinkHash(), LinkHash()
    for key, payload in items:
        one.add(key, payload_digest(payload))
    mixed = list(items)
    rng.shuffle(mixed)
    for key, payload in mixed:
        other.add(key, payload_digest(payload))
    one.turn()
    other.turn()
    assert one.digest == other.digest
    if items:
        less = LinkHash()
        for key, payload in items[1:]:
            less.add(key, payload_digest(payload))
        less.turn()
        assert less.digest != one.digest
        one.add(items[0][0], payload_digest(items[0][1]))  # of a step that never ended
        assert one.digest == other.digest


@given(ENTRIES)
def test_a_tape_is_read_as_it_was_written(entries: list[tuple[PayloadKey, bytes]]) -> None:
    tape = tape_of(entries)
    reader, found = TapeReader(memoryview(tape)), []
    while reader.left:
        entry, head, payload = reader.next()
        assert len(head) <= 4 + ENTRY_HEAD_BYTES_MAX
        found.append((entry.key, bytes(payload)))
    assert found == entries
    with pytest.raises(MalformedRecord):
        reader.next()
    assert whole_entries(memoryview(tape)) == len(tape)


@given(ENTRIES.filter(bool), st.data())
def test_what_a_crash_left_of_a_tape_is_its_sound_beginning(
    entries: list[tuple[PayloadKey, bytes]], data: st.DataObject
) -> None:
    tape = bytearray(tape_of(entries))
    keep = data.draw(st.integers(0, len(entries) - 1))
    start = len(tape_of(entries[:keep]))
    end = start + len(tape_of(entries[keep : keep + 1]))
    if data.draw(st.booleans()) or not entries[keep][1]:
        torn = bytes(tape[: data.draw(st.integers(start, end - 1))])
    else:
        tape[data.draw(st.integers(end - len(entries[keep][1]), end - 1))] ^= 1  # a byte of its payload
        torn = bytes(tape)
    assert whole_entries(memoryview(torn)) == start


@given(st.binary(max_size=300))
def test_any_bytes_are_a_tape_or_refused(data: bytes) -> None:
    reader = TapeReader(memoryview(data))
    try:
        while reader.left:
            reader.next()
    except MalformedRecord:
        return
    assert reader.place == len(data)


@given(st.lists(st.integers(0, 3 * 2**19), max_size=5))
def test_the_hash_of_a_growing_tape_is_its_blobs_id(sizes: list[int]) -> None:
    growing, parts = TapeHash(), [bytes([number]) * size for number, size in enumerate(sizes)]
    for part in parts:
        growing.add(part)
    whole, chunk = b"".join(parts), params.BLOB_CHUNK_BYTES
    assert growing.blob == blob_id(manifest_of(whole[i : i + chunk] for i in range(0, len(whole), chunk)))
