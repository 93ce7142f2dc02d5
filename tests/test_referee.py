"""The referee's checklist of DESIGN §7: a test for each line, with the attack it stops."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol import merkle, params
from protocol.blob import manifest_of
from protocol.codec import encode
from protocol.dispute import Game
from protocol.dispute_facts import Facts
from protocol.dispute_player import answer
from protocol.dispute_wire import (
    DataOpening,
    Opening,
    OpenTile,
    ShowNodes,
    ShowOperands,
    ShowTile,
    TileShown,
)
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord, VerificationFailed
from protocol.program import Init, Input, Items, Node, Program, Ref, Type, Update
from protocol.referee import Agreed, judge
from protocol.reference_movement import Array
from protocol.task import BatchRule
from tests.dispute_scene import (
    TEXT,
    Liar,
    game_of,
    honest,
    play,
    program,
    task_for,
    value_of,
)
from tests.test_dispute import at, lying

LAST = 2


def at_leaf(name: str, block: int = 512) -> Game:
    """A game about a lie of tests/test_dispute.py whose operands are all that is missing."""
    cheat = lying(name)
    game = game_of(cheat, honest(), block=block)
    for side, number, body in moves(name, block):
        game.take(side, number, body)
    assert game.wants_opening()
    return game


@cache
def moves(name: str, block: int) -> list[tuple[str, int, bytes]]:
    return [move for move in play(game_of(lying(name), honest(), block=block), lying(name), honest()) if move[0]]


def opening_of(game: Game) -> Opening:
    question = game.question("challenger")
    assert question is not None
    return msgspec.msgpack.decode(answer(question, honest()).opening, type=Opening)


def refused(game: Game, data: bytes, kind: type[IchibaError], match: str = ".") -> None:
    """The opening is refused, nothing changed, and the true one still ends the game."""
    before = (game.number, game.level, game.transcript(), game.question("challenger"))
    with pytest.raises(kind, match=match):
        game.open(data)
    assert (game.number, game.level, game.transcript(), game.question("challenger")) == before
    assert game.wants_opening()
    game.open(answer(before[3] or b"", honest()).opening)
    assert game.result is not None and game.result.loser == "solver"


def with_tile(opening: Opening, number: int, **fields: Any) -> bytes:
    tiles = list(opening.tiles)
    tiles[number] = msgspec.structs.replace(tiles[number], **fields)
    return encode(msgspec.structs.replace(opening, tiles=tuple(tiles)))


def with_tensor(opening: Opening, number: int, **fields: Any) -> bytes:
    tensors = list(opening.tensors)
    tensors[number] = msgspec.structs.replace(tensors[number], **fields)
    return encode(msgspec.structs.replace(opening, tensors=tuple(tensors)))


# --- each revealed value has a path under a committed root -------------------------------------------------
def test_a_tile_that_is_not_under_its_tensors_root_is_refused() -> None:
    """The attack: the operand's true root, and a tile that makes the wrong result right."""
    game = at_leaf("a product")
    opening = opening_of(game)
    data = bytearray(opening.tiles[0].data)
    data[0] ^= 1
    refused(game, with_tile(opening, 0, data=bytes(data)), VerificationFailed, "is not under root")


def test_a_path_of_another_length_is_refused() -> None:
    """The attack: an inner node shown as if it were a leaf, by a path that is one hash short."""
    game = at_leaf("a product")
    opening = opening_of(game)
    tensor = opening.tensors[0]
    refused(game, with_tensor(opening, 0, path=tensor.path[:-1]), VerificationFailed, "path of")


# --- positions are chosen by the referee -------------------------------------------------------------------
def test_another_tile_than_the_one_that_is_read_is_refused() -> None:
    """The attack: a true tile of the true operand, from another place."""
    game = at_leaf("an update")
    opening = opening_of(game)
    value = opening.tensors[0].value
    array = honest().tensors(LAST, [value])[value]
    for tile in range(2):
        data, path = merkle.tensor_path(array, tile)
        if tile == opening.tiles[0].tile:
            continue
        swapped = with_tile(opening, 0, tile=tile, data=data, path=tuple(path))
        refused(game, swapped, VerificationFailed, "was not opened")
        break


def test_a_tile_beside_those_that_are_read_is_refused() -> None:
    """The attack: true tiles without end, to make the referee work."""
    game = at_leaf("an update")
    opening = opening_of(game)
    value, known = opening.tensors[0].value, {tile.tile for tile in opening.tiles}
    array = honest().tensors(LAST, [value])[value]
    more = next(n for n in range(len(merkle.tiles(array))) if n not in known)
    data, path = merkle.tensor_path(array, more)
    tiles = sorted([*opening.tiles, OpenTile(value, more, data, tuple(path))], key=lambda tile: (tile.value, tile.tile))
    refused(game, encode(Opening(opening.tensors, tuple(tiles))), VerificationFailed, "more than the operation reads")


def test_a_tile_or_a_tensor_shown_twice_is_refused() -> None:
    game = at_leaf("an update")
    opening = opening_of(game)
    twice = Opening(opening.tensors, (opening.tiles[0], *opening.tiles))
    refused(game, encode(twice), VerificationFailed, "twice")
    game = at_leaf("an update")
    refused(game, encode(Opening((opening.tensors[0], *opening.tensors), opening.tiles)), VerificationFailed, "twice")


# --- the first divergence, never any -----------------------------------------------------------------------
def test_of_two_lies_the_first_one_is_judged() -> None:
    """The attack: a second lie after the first, to have the first one's operands taken for agreed."""
    early, late = value_of("h"), value_of("w'")

    def alter(step: int, which: int, array: Array) -> Array:
        if step != LAST or which not in (early, late):
            return array
        elements = list(array.elements)
        elements[5] ^= 1 << 22
        return Array(array.dtype, array.shape, tuple(elements))

    cheat = Liar(LAST, alter)
    game = game_of(cheat, honest())
    play(game, cheat, honest())
    node = next(rung for rung in game.descent() if rung.level == "node")
    assert node.where == f"node {early - program().first_node}"
    assert game.result is not None and game.result.loser == "solver"


# --- operands' roots equal the agreed producers' outputs ---------------------------------------------------
def test_an_operand_that_no_producer_gave_is_refused() -> None:
    """The attack: a free input. A tensor of one's own, with a root and paths that fit it."""
    for name in ("a product", "an update"):
        for number in range(len(opening_of(at_leaf(name)).tensors)):
            game = at_leaf(name)
            opening = opening_of(game)
            tensor = opening.tensors[number]
            kind = game.facts.type_of(tensor.value)
            own = np.ones(kind.shape, kind.dtype)
            cut = merkle.tiles(own)
            levels = merkle.merkle_levels(cut)
            tiles = tuple(
                OpenTile(tile.value, tile.tile, bytes(cut[tile.tile]), tuple(merkle.path_in(levels, tile.tile)))
                if tile.value == tensor.value
                else tile
                for tile in opening.tiles
            )
            tensors = list(opening.tensors)
            tensors[number] = msgspec.structs.replace(tensor, root=merkle.tensor_root(own), tree=levels[-1][0])
            refused(game, encode(Opening(tuple(tensors), tiles)), VerificationFailed, "is not in the")


def test_an_operand_of_another_step_is_refused() -> None:
    """The attack: the state of two steps before, true and with a true path under its own root."""
    game = at_leaf("an update")
    opening = opening_of(game)
    place = game.facts.state_index(opening.tensors[0].value)
    assert place is not None
    roots = list(honest().state_roots(0))
    levels = merkle.levels_over(game.facts.hashes("state", roots, 0))
    stale = with_tensor(opening, 0, root=roots[place], path=tuple(merkle.path_in(levels, place)))
    refused(game, stale, VerificationFailed, "not in the state before the step|is not that of tensor")


@pytest.mark.parametrize("name", ["learning_rate", "x", "z", "frozen"])
def test_a_value_that_the_operation_does_not_read_is_refused(name: str) -> None:
    """The attack: an operand slipped in under another value's number."""
    game = at_leaf("a product")
    opening = opening_of(game)
    moved = with_tensor(opening, 1, value=value_of(name))
    refused(game, moved, VerificationFailed, "does not read it|twice|whose root is not opened")


def test_what_the_referee_computes_itself_cannot_be_opened() -> None:
    """The attack: another learning rate, opened like an operand."""
    game = at_leaf("a rate times a gradient")
    opening = opening_of(game)
    rate = msgspec.structs.replace(opening.tensors[0], value=value_of("learning_rate"))
    tensors = tuple(sorted([*opening.tensors, rate], key=lambda tensor: tensor.value))
    refused(game, encode(Opening(tensors, opening.tiles)), VerificationFailed, "computed by the referee")


def test_a_state_that_is_handed_on_is_held_against_the_state_before() -> None:
    """The attack: a frozen tensor exchanged, and its new root opened as if it had always been there."""
    game = at_leaf("state that is handed on")
    opening = opening_of(game)
    own = merkle.tensor_root(np.ones(3, np.float32))
    refused(game, with_tensor(opening, 0, root=own), VerificationFailed, "not in the state before")
    game = at_leaf("state that is handed on")
    refused(game, encode(Opening((), ())), VerificationFailed, "alone")


# --- leaf and inner hashes tagged apart, odd nodes promoted ------------------------------------------------
def test_an_inner_node_is_never_a_leaf_and_an_odd_node_is_never_doubled() -> None:
    """The attack: two lists of one root, and a tile made of two hashes."""
    leaves = [bytes([n]) * 32 for n in range(5)]
    assert merkle.merkle_root(leaves) != merkle.merkle_root([*leaves, leaves[-1]])
    left, right = map(merkle.leaf_hash, leaves[:2])
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)
    for count in range(1, 70):
        hashes = [merkle.leaf_hash(bytes([n])) for n in range(count)]
        assert merkle.fold(hashes, merkle.tree_height(count)) == [
            merkle.merkle_root([bytes([n]) for n in range(count)])
        ]


# --- tile index in range, padding zero ---------------------------------------------------------------------
def test_a_tile_beyond_the_tensor_or_with_a_full_margin_is_refused() -> None:
    """The attack: values in the margin, or behind it, that the rule might be made to read."""
    game = at_leaf("an update")
    opening = opening_of(game)
    far = with_tile(opening, len(opening.tiles) - 1, tile=4000)
    refused(game, far, VerificationFailed, "is not one of")
    array = np.arange(36 * 34, dtype=np.float32).reshape(36, 34)
    tile = bytearray(merkle.tiles(array)[1])
    tile[4 * 31 : 4 * 32] = b"\0\0\x80\x3f"
    with pytest.raises(VerificationFailed, match="padding"):
        merkle.check_tile(bytes(tile), tile=1, shape=(36, 34), dtype="float32")


# --- NaN, -0.0 and subnormals canonical --------------------------------------------------------------------
def test_one_value_has_one_encoding() -> None:
    """The attack: a dispute about the payload of a NaN, that honest machines do not agree on."""
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert len({merkle.tensor_root(nans[n : n + 1]) for n in range(4)}) == 1
    tile = bytearray(4096)
    tile[:4] = b"\x01\0\xc0\x7f"
    with pytest.raises(VerificationFailed, match="NaN"):
        merkle.check_tile(bytes(tile), tile=0, shape=(1,), dtype="float32")
    signed = np.array([0.0, -0.0, 1e-45, -1e-45], np.float32)
    assert len({merkle.tensor_root(signed[n : n + 1]) for n in range(4)}) == 4
    with pytest.raises(VerificationFailed, match="no bool"):
        merkle.check_tile(b"\2" + bytes(4095), tile=0, shape=(1,), dtype="bool")


# --- two values for one position lose at once --------------------------------------------------------------
def test_two_values_for_one_position_lose() -> None:
    """The attack: a tile that suits the leaf better than the one whose hash was shown."""
    game, bodies = at(ShowTile)
    data = bytearray(msgspec.msgpack.decode(bodies["solver"], type=TileShown).data)
    data[0] ^= 1
    game.take("solver", game.number, encode(TileShown(bytes(data))))
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "malformed")


def test_a_first_move_that_does_not_end_in_the_signed_root_loses() -> None:
    """The attack: to defend another root in the dispute than the one the receipt says."""
    game, bodies = at(ShowNodes, "steps")
    game.take("solver", 0, bodies["challenger"])
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "malformed")


# --- nothing is ever unpickled; every byte is bounded ------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", MalformedRecord),
        (b"\x80\x04\x95", MalformedRecord),
        (b"cos\nsystem\n(S'true'\ntR.", MalformedRecord),
        (bytes(params.OPENING_BYTES_MAX + 1), LimitExceeded),
        (encode(DataOpening(b"", b"")), MalformedRecord),
        (encode(["ichiba/opening/1", [], [], []]), MalformedRecord),
        (encode(["ichiba/opening/1", [[0, bytes(31), bytes(32), []]], []]), MalformedRecord),
        (encode(["ichiba/opening/1", [[2**63, bytes(32), bytes(32), []]], []]), MalformedRecord),
        (encode(["ichiba/opening/1", [[10**6, bytes(32), bytes(32), []]], []]), VerificationFailed),
        (encode(["ichiba/opening/1", [], [[0, 0, bytes(4096), []]] * 41]), MalformedRecord),
        (encode(["ichiba/opening/1", [], []]), VerificationFailed),
    ],
)
def test_hostile_openings_are_refused_and_change_nothing(data: bytes, kind: type[IchibaError]) -> None:
    for name in ("a product", "state that is handed on"):
        refused(at_leaf(name), data, kind)


# --- the batch ---------------------------------------------------------------------------------------------
def test_a_batch_is_read_from_the_data_and_nowhere_else() -> None:
    """The attacks: another array, another chunk, another manifest, an array that another blob names."""
    game = at_leaf("a batch of other data")
    place = game.wants_data()
    assert place is not None and (place.array.name, place.chunk) == ("text", 0)
    manifest = encode(manifest_of([TEXT]))
    other = bytes([*TEXT[:-1], 9])
    for data, kind in (
        (encode(DataOpening(manifest, other)), VerificationFailed),
        (encode(DataOpening(encode(manifest_of([other])), other)), VerificationFailed),
        (encode(DataOpening(manifest, TEXT[:-1])), VerificationFailed),
        (encode(DataOpening(b"", TEXT)), MalformedRecord),
        (encode(Opening((), ())), MalformedRecord),
    ):
        game = at_leaf("a batch of other data")
        refused(game, data, kind)
    game = at_leaf("a batch of other data")
    game.open(encode(DataOpening(manifest, TEXT)))
    assert game.result is not None and game.result.loser == "solver"


def test_floats_and_labels_are_read_as_the_batch_converts_them() -> None:
    made = Program(
        (
            Input("w", "parameter", "float32", (2, 3), Init.of("given")),
            Input("x", "batch", "float32", (2, 3), None),
            Input("y", "batch", "int64", (2,), None),
        ),
        (),
        (
            Node("add.Tensor", (Ref(0), Ref(1)), "float32", (2, 3), ""),
            Node("to.dtype", (Ref(2), Type("float32")), "float32", (2,), ""),
            Node("sum.dim_IntList", (Ref(4), Items((0,)), False), "float32", (), ""),
        ),
        (Update("w", 3),),
        5,
    )
    made.check()
    x = np.array([[1, -2, 3], [7, 8, 9]], np.int32)
    y = np.array([200, 3], np.uint8)
    spec = task_for(made, {"x": x, "y": y}, BatchRule("sequence", 2, 0), steps=1, steps_per_segment=1)
    facts = Facts(spec, made, 0)
    for value, array, element, expected in ((1, x, 1, 0xC0000000), (2, y, 0, 200)):
        data = encode(DataOpening(encode(manifest_of([array.tobytes()])), array.tobytes()))
        finding = judge(facts, ShowOperands(0, value, element, 0, 0), Agreed(bytes(32), ()), data)
        assert finding.result == expected
