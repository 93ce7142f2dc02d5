"""What travels in a dispute: questions to a player's machine, bodies of moves, operands opened to the referee.

A question names places only, never values: everything else a machine needs is in the task, the Program and the data.
Every struct bounds each field, so that no bytes from a stranger cost more than a constant of work.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.blob import MANIFEST_BYTES_MAX
from protocol.codec import Digest, Uint

__all__ = [
    "DATA_OPENING_BYTES_MAX",
    "PATH_HASHES_MAX",
    "TILE_BYTES",
    "DataOpening",
    "Evidence",
    "OpenTensor",
    "OpenTile",
    "Opening",
    "Partials",
    "Question",
    "Revealed",
    "ShowDissent",
    "ShowDistance",
    "ShowNodes",
    "ShowOperands",
    "ShowPartials",
    "ShowState",
    "ShowStates",
    "ShowTile",
    "ShowTrace",
    "TileShown",
    "Tree",
]

TILE_BYTES = 4 * params.TILE_SIDE**2
PATH_HASHES_MAX = 64  # of a tree of 2**40 tiles: 40
DATA_OPENING_BYTES_MAX = MANIFEST_BYTES_MAX + params.BLOB_CHUNK_BYTES + 64  # the one opening that no player has to hold

Tree: TypeAlias = Literal["steps", "state", "trace", "tiles"]
Path = Annotated[tuple[Digest, ...], msgspec.Meta(max_length=PATH_HASHES_MAX)]
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
State = Annotated[tuple[Whole, ...], msgspec.Meta(min_length=1, max_length=3)]


# --- questions ---------------------------------------------------------------------------------------------
class ShowNodes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="nodes"):
    """The up to 16 descendants, four levels down, of node `position` at `height` of a tree.

    tree: `steps`, over the state roots of the segment; `state`, over the tensors after step `step`; `trace`, over the
    batch inputs and node results of `step`; `tiles`, of value `value` in `step`. leaf: at the top of `steps` and
    `trace`, the leaf whose path is asked for too; at the top of `state` the leaf of `steps` that is the state before,
    asked for with its path unless the step is the segment's first. Steps are numbered from 0 within the segment.
    """

    tree: Tree
    step: Uint
    value: Uint
    height: Annotated[int, msgspec.Meta(ge=0, le=PATH_HASHES_MAX)]
    position: Uint
    leaf: Uint | None


class ShowTile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="tile"):
    """The bytes of tile `tile` of value `value` in step `step`."""

    step: Uint
    value: Uint
    tile: Uint


class ShowPartials(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="partials"):
    """The partial results of element `element` of value `value` after so many terms (protocol/dispute_partials.py)."""

    step: Uint
    value: Uint
    element: Uint
    positions: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.DISPUTE_ARITY)]


class ShowOperands(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="operands"):
    """The operands of element `element` of value `value`: all, or of a reduction those of terms `low` to `high`.

    Of a value that is an input of role state only its root is asked for, under the root of the state before the step.
    """

    step: Uint
    value: Uint
    element: Uint
    low: Uint
    high: Uint


class ShowStates(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="states"):
    """Evidence, before a game in tolerant mode: the roots of all states that the segment goes through."""


class ShowState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="state-before"):
    """Evidence: the state before step `step`; before the one after the last, the segment's end."""

    step: Uint


class ShowTrace(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="trace-of"):
    """Evidence: the roots of the state's tensors after step `step`, and all values of its trace."""

    step: Uint


class ShowDistance(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="distance"):
    """Of a solver's state before step `step`: how far it is from this machine's own run."""

    step: Uint


class ShowDissent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dissent"):
    """Of a solver's evidence about step `step`: where it first cannot be honest (protocol/dispute_following.py)."""

    step: Uint


Evidence: TypeAlias = ShowStates | ShowState | ShowTrace | ShowDistance | ShowDissent


class Question(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/question/1"):
    """What one side's machine must answer in round `number`, or show as evidence. in_root: of the segment, to know its
    base by."""

    dispute: Digest
    side: Literal["solver", "challenger"]
    number: Uint
    segment: Uint
    in_root: Digest
    ask: ShowNodes | ShowTile | ShowPartials | ShowOperands | Evidence


# --- bodies of moves ---------------------------------------------------------------------------------------
class Revealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="revealed"):
    """Descendants from left to right: hashes, or at height 0 of `steps`, `state` and `trace` the roots themselves.

    path, leaf: what the question asked for beside them; leaf is stated for the state before the step alone.
    """

    nodes: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=params.DISPUTE_ARITY)]
    path: Path
    leaf: Digest | None


class TileShown(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="tile"):
    """One tile."""

    data: Annotated[bytes, msgspec.Meta(min_length=TILE_BYTES, max_length=TILE_BYTES)]


class Partials(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="partials"):
    """The partial results at the positions asked for."""

    states: Annotated[tuple[State, ...], msgspec.Meta(min_length=1, max_length=params.DISPUTE_ARITY)]


# --- openings ----------------------------------------------------------------------------------------------
class OpenTensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The root of an operand, under the trace's root, or of state under the root of the state before the step."""

    value: Uint
    root: Digest
    tree: Digest  # of its tiles; 32 zeros where none is opened
    path: Path


class OpenTile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tile of a tensor that is opened beside it."""

    value: Uint
    tile: Uint
    data: Annotated[bytes, msgspec.Meta(min_length=TILE_BYTES, max_length=TILE_BYTES)]
    path: Path


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/opening/1"):
    """Operands: tensors by value, tiles by value and number, each once and in that order, none that is not read."""

    tensors: Annotated[tuple[OpenTensor, ...], msgspec.Meta(max_length=8)]
    tiles: Annotated[tuple[OpenTile, ...], msgspec.Meta(max_length=params.OPENING_TILES_MAX)]


class DataOpening(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/data-opening/1"
):
    """One chunk of an array of the task, and the manifest that proves it."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=MANIFEST_BYTES_MAX)]
    chunk: Annotated[bytes, msgspec.Meta(max_length=params.BLOB_CHUNK_BYTES)]
