"""Segments of units: what they exchange, by every codec, and that base and tape alone lead to the same root."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from protocol import params
from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.payload import PayloadKey
from protocol.stage import (
    KEPT_PREFIX,
    OUTER_PREFIX,
    RECEIVED,
    RESIDUAL_PREFIX,
    SEEN_PREFIX,
    SENT,
    Codec,
    Stage,
    links_in,
    links_out,
)
from protocol.tape import TapeReader, entry_head
from protocol.task import Schedule
from tests.unit_scene import Ran, Unit, checked, made_unit, run_threads, stage_of, unit_program, unit_run
from worker.crossings import BadTape, TapeWire, check_unit
from worker.executor import Diverged, Executor
from worker.link_codecs import BadPayload, LinkCodecs
from worker.training import Ordered

TILE, CHANGE = Codec("tile", 4), Codec("change", 4)
LOCAL = {"replicas": 2, "sync": "local", "outer_rate_nano": 700_000_000, "outer_momentum_nano": 900_000_000}
STEP = {"replicas": 2, "sync": "step"}
KINDS: dict[str, dict[str, Any]] = {
    "tile": {"forward": TILE, "backward": Codec("tile", 8)},
    "change": {"forward": CHANGE, "backward": TILE},
    "step": {**STEP},
    "step, tile": {**STEP, "shared": TILE, "forward": CHANGE},
    "local": {**LOCAL},
    "local, tile": {**LOCAL, "shared": TILE, "forward": CHANGE},
    "local, sparse": {**LOCAL, "shared": Codec("sparse", 2)},
}


def units(folder: Path, **fields: Any) -> list[Unit]:
    replicas = fields.get("replicas", 1)
    return [
        made_unit(folder, stage_of(stage, replica=replica, **fields))
        for stage in range(2)
        for replica in range(replicas)
    ]


def ran(folder: Path, cheats: dict[int, str] | None = None, **fields: Any) -> list[Ran]:
    found = run_threads(units(folder, **fields), cheats)
    assert [mine.error for mine in found] == [None] * len(found)
    return found


def row(state: dict[str, torch.Tensor], name: str, links: list[Any], flow: str, other: int) -> bytes:
    (number,) = [i for i, link in enumerate(links) if (link.flow, link.other) == (flow, other)]
    return bytes(state[name][number].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_every_link_agree_and_every_segment_is_checked_alone(kind: str, tmp_path: Path) -> None:
    found = ran(tmp_path, **KINDS[kind])
    by_unit = {mine.unit.stage.unit: mine for mine in found}
    for mine in found:
        stage = mine.unit.stage
        for segment, result in enumerate(mine.results):
            again = checked(mine, segment)
            assert (again.in_root, again.out_root, again.losses) == (result.in_root, result.out_root, result.losses)
            assert again.checkpoint == result.checkpoint
            for link in links_out(stage):
                other = by_unit[link.other]
                sent = row(mine.end(segment), SENT, list(links_out(stage)), link.flow, link.other)
                came = row(other.end(segment), RECEIVED, list(links_in(other.unit.stage)), link.flow, stage.unit)
                assert sent == came


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "replicas" in KINDS[kind]])
def test_replicas_hold_the_same_weights_after_every_exchange(kind: str, tmp_path: Path) -> None:
    found = ran(tmp_path, **KINDS[kind])
    for name, pair in (("w", found[:2]), ("v", found[2:])):
        for segment in range(3):
            one, other = (mine.end(segment)[name] for mine in pair)
            assert torch.equal(one, other)
        assert not torch.equal(pair[0].end(0)[name], pair[0].end(1)[name]), "they train"
    assert found[0].unit.task.seed != found[1].unit.task.seed, "on data of their own"


def test_an_outer_step_is_nesterovs_of_the_mean_change(tmp_path: Path) -> None:
    found = ran(tmp_path, **LOCAL)
    alone = [ran(tmp_path, **{**LOCAL, "outer_rate_nano": 0})[unit] for unit in range(2)]
    assert torch.equal(alone[0].end(2)["w"], alone[1].end(0)["w"]), "at rate 0 nothing moves"
    state = found[0].end(0)
    start = alone[0].end(0)["w"]
    momentum = state[OUTER_PREFIX + "w"]
    assert torch.allclose(state["w"], start + 0.7 * (momentum + 0.9 * momentum), atol=1e-6), (
        "the first: momentum = mean"
    )
    assert not state[RESIDUAL_PREFIX + "w"].any(), "float32 leaves nothing out"
    lossy = ran(tmp_path, **{**LOCAL, "shared": TILE})
    assert lossy[0].end(0)[RESIDUAL_PREFIX + "w"].any()


def test_both_ends_of_a_change_link_remember_the_same_examples(tmp_path: Path) -> None:
    first, second = ran(tmp_path, forward=CHANGE)
    for segment in range(3):
        for prefix in (KEPT_PREFIX, SEEN_PREFIX):
            sent, came = first.end(segment)[f"{prefix}send.forward.0"], second.end(segment)[f"{prefix}recv.forward.0"]
            assert torch.equal(sent, came)
    seen = [int(first.end(segment)[f"{SEEN_PREFIX}send.forward.0"].sum()) for segment in range(3)]
    assert 0 < seen[0] < seen[1] <= seen[2]


# --- tapes -------------------------------------------------------------------------------------------------
def entries(tape: bytes | bytearray) -> list[tuple[Any, bytes]]:
    reader, found = TapeReader(memoryview(tape)), []
    while reader.left:
        entry, _, payload = reader.next()
        found.append((entry.key, bytes(payload)))
    return found


def tape_of(items: list[tuple[Any, bytes]]) -> bytes:
    return b"".join(entry_head(key, payload) + payload for key, payload in items)


def test_a_tape_that_is_not_what_the_segment_asks_for_is_refused(tmp_path: Path) -> None:
    _, second = ran(tmp_path)
    whole = entries(second.wire.tapes[1])
    assert tape_of(whole) == second.wire.tapes[1]
    wrong = {
        "missing": whole[:-1],
        "extra": [*whole, whole[-1]],
        "swapped": [whole[1], whole[0], *whole[2:]],
        "of another unit": [(msgspec.structs.replace(whole[0][0], unit=1), whole[0][1]), *whole[1:]],
        "of another step": [(msgspec.structs.replace(whole[0][0], step=0), whole[0][1]), *whole[1:]],
        "of no unit": [(msgspec.structs.replace(whole[0][0], unit=params.PARALLEL_UNITS_MAX), b""), *whole[1:]],
        "short": [(whole[0][0], whole[0][1][:-4]), *whole[1:]],
        "long": [(whole[0][0], whole[0][1] + bytes(4)), *whole[1:]],
    }
    for items in wrong.values():
        with pytest.raises((BadTape, BadPayload)):
            checked(second, 1, tape_of(items))
    for torn in (b"\x00", bytes(second.wire.tapes[1])[:-1], b"\xff" * 200):
        with pytest.raises(BadTape):
            checked(second, 1, torn)


def test_another_tensor_on_the_tape_leads_to_another_root(tmp_path: Path) -> None:
    _, second = ran(tmp_path)
    items = entries(second.wire.tapes[1])
    changed = np.frombuffer(items[0][1], "<f4").copy()
    changed[0] += 1
    other = checked(second, 1, tape_of([(items[0][0], changed.tobytes()), *items[1:]]))
    assert other.out_root != second.results[1].out_root
    rewritten = bytearray(tape_of(items))
    place = rewritten.index(items[0][1])
    rewritten[place - 1] ^= 1  # the last byte of the head is of the checksum, which only a daemon looks at
    try:
        same = checked(second, 1, bytes(rewritten))
    except MalformedRecord:
        return
    assert same.out_root != second.results[1].out_root, "the tape's blob is part of the state"


# --- frauds and hostile units --------------------------------------------------------------------------------
@pytest.mark.parametrize(("cheat", "unit"), [("garbage-activations", 0), ("skip-backward", 1), ("skip-backward", 0)])
def test_a_cheating_unit_is_found_from_its_own_tape_and_its_neighbour_is_not(
    cheat: str, unit: int, tmp_path: Path
) -> None:
    found = ran(tmp_path, {unit: cheat})
    for mine in found:
        for segment, result in enumerate(mine.results):
            honest = mine.unit.stage.unit != unit or segment == 0
            assert (checked(mine, segment).out_root == result.out_root) == honest


def test_an_unknown_fraud_is_named(tmp_path: Path) -> None:
    (mine,) = run_threads(units(tmp_path)[:1], {0: "skip-step"})
    assert isinstance(mine.error, LocalProtocolError)
    assert "garbage-activations" in str(mine.error)


def test_a_payload_of_the_wrong_size_is_the_neighbours_fault(tmp_path: Path) -> None:
    found = units(tmp_path)
    other = made_unit(tmp_path, stage_of(0, forward=TILE))
    _, second = run_threads([other, found[1]])
    assert isinstance(second.error, BadPayload)
    assert "unit 0" in str(second.error)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00001, 0x7F800001])
def test_a_tensor_that_holds_nan_is_the_neighbours_fault_and_no_divergence_of_who_gets_it(
    bits: int, tmp_path: Path
) -> None:
    _, second = ran(tmp_path)
    items = entries(second.wire.tapes[1])
    spoiled = np.frombuffer(items[0][1], "<u4").copy()
    spoiled[-1] = bits
    with pytest.raises(BadPayload, match="NaN") as failed:
        checked(second, 1, tape_of([(items[0][0], spoiled.tobytes()), *items[1:]]))
    assert failed.value.unit == 0


def test_who_computes_nan_diverges_instead_of_sending_it(tmp_path: Path) -> None:
    first, _ = units(tmp_path)
    codecs = LinkCodecs(first.task, first.program, {})
    codecs.begin(3)
    good = torch.tensor([1.0, -math.inf])  # as of a mask
    key = PayloadKey(3, "forward", 0, 0, 0)
    assert codecs.encode(key, good)[0] == good.numpy().tobytes()
    with pytest.raises(Diverged):
        codecs.encode(key, torch.tensor([1.0, math.nan]))


def changed_stage(stage: Stage, **fields: Any) -> Stage:
    return msgspec.structs.replace(stage, **fields)


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("value", lambda stage: {"sends": (msgspec.structs.replace(stage.sends[0], value=10_000), *stage.sends[1:])}),
        ("is not the batch input", lambda stage: {"receives": (msgspec.structs.replace(stage.receives[0], value=0),)}),
        ("received from nobody", lambda stage: {"receives": stage.receives[:1]}),
        ("has no state", lambda stage: {"sync": "local", "replicas": 2}),
    ],
)
def test_a_stage_that_does_not_fit_its_program_is_refused(what: str, fields: Any, tmp_path: Path) -> None:
    unit = units(tmp_path)[0]
    check_unit(unit.task, unit.program)
    stage = changed_stage(unit.stage, **fields(unit.stage))
    with pytest.raises(MalformedRecord, match=what):
        check_unit(msgspec.structs.replace(unit.task, stage=stage), unit.program)


def test_a_program_may_not_write_what_a_segments_end_sets(tmp_path: Path) -> None:
    unit = units(tmp_path)[0]
    swapped = [
        msgspec.structs.replace(update, value=next(u.value for u in unit.program.updates if u.name == RECEIVED))
        if update.name == SENT
        else update
        for update in unit.program.updates
    ]
    with pytest.raises(MalformedRecord, match="hand on"):
        check_unit(unit.task, msgspec.structs.replace(unit.program, updates=tuple(swapped)))


def test_a_memory_that_does_not_fit_the_data_is_refused(tmp_path: Path) -> None:
    unit = units(tmp_path, forward=CHANGE)[0]
    check_unit(unit.task, unit.program)
    more = tuple(msgspec.structs.replace(ref, shape=(17, *ref.shape[1:])) for ref in unit.task.arrays)
    with pytest.raises(MalformedRecord, match="examples"):
        check_unit(msgspec.structs.replace(unit.task, arrays=more), unit.program)


# --- divergence ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("forward", [Codec("float32"), TILE, CHANGE])
def test_a_unit_that_diverges_ends_at_that_step_with_the_state_before_it(forward: Codec, tmp_path: Path) -> None:
    absurd = Schedule("constant", 10**17, 0, 0)
    both = [made_unit(tmp_path, stage_of(number, forward=forward), schedule=absurd) for number in range(2)]
    found = run_threads(both)
    diverged = [mine for mine in found if mine.results and mine.results[-1].diverged_step is not None]
    assert diverged, "the learning rate is absurd"
    for mine in diverged:
        last = mine.results[-1]
        assert last.last_step == last.diverged_step
        again = checked(mine, last.segment)
        assert (again.out_root, again.diverged_step) == (last.out_root, last.diverged_step)
        assert all(tensor.isfinite().all() for tensor in mine.end(-1).values() if tensor.is_floating_point())


def test_an_ordered_false_end_lacks_the_last_step(tmp_path: Path) -> None:
    mine = ran(tmp_path)[1]
    wire = TapeWire(1, [memoryview(bytes(mine.wire.tapes[1]))])
    (result,) = unit_run(mine, wire, range(1, 2), ordered=Ordered(1, "skip-step"))
    assert result.out_root == mine.results[1].out_root
    assert result.false_end is not None
    assert result.false_end.root not in (result.out_root, result.in_root)
    assert result.losses[-1] == mine.results[1].losses[0]


def test_a_received_tensor_that_no_node_reads_is_refused(tmp_path: Path) -> None:
    program, stage = unit_program(stage_of(1))
    unread = msgspec.structs.replace(stage.receives[0], value=3)
    with pytest.raises(MalformedRecord, match="no node reads"):
        Executor(program, stage=changed_stage(stage, receives=(*stage.receives, unread)))
