"""The pinpoint game: two state roots of one segment in, the one that does not follow out. Sans-IO, no clock.

Both sides answer one question a round, at the same time; a round closes when both answers are in, so where a game
stands is a function of the set of moves and of nothing else. Every answer is held against what that side committed to
before; the descent always goes to the leftmost place where the sides differ, so everything before it is agreed, and
what is left in the end is one operation on agreed operands, which protocol/referee.py repeats. DESIGN §7.

A side that contradicts itself loses as malformed. If both sides do, or both are wrong at the leaf, the solver loses:
its root is wrong all the same. Nothing depends on which answer of a round came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from protocol import merkle, params
from protocol.batches import check_batches
from protocol.bounds import Bound, check_within
from protocol.codec import blake, decode, encode
from protocol.dispute_facts import Facts
from protocol.dispute_partials import Chain, Partial, fits_opening, tiles_read
from protocol.dispute_player import children
from protocol.dispute_terms import SIDES, Cause, Level, Pledge, Result, Rung, Side, Terms, Value
from protocol.dispute_wire import (
    Partials,
    Question,
    Revealed,
    ShowNodes,
    ShowOperands,
    ShowPartials,
    ShowTile,
    TileShown,
    Tree,
)
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.referee import Agreed, DataPlace, data_place, judge

__all__ = ["SIDES", "Cause", "Game", "Level", "Pledge", "Result", "Rung", "Side", "Terms"]

Ask: TypeAlias = "ShowNodes | ShowTile | ShowPartials"
Shown: TypeAlias = "Revealed | TileShown | Partials"

_LEVELS: dict[Tree, Level] = {"steps": "step", "state": "state", "trace": "node", "tiles": "tile"}


class Game:
    """One dispute. Give it moves and openings in any order; ask it what is owed, what to ask, and for the result."""

    def __init__(self, terms: Terms) -> None:
        """Raises MalformedRecord for a task that does not fit its Program, LocalProtocolError if nothing differs."""
        if terms.claimed_root == terms.found_root:
            raise LocalProtocolError("both sides stand by one root", next_step="challenge what differs")
        tolerance = terms.tolerance
        if terms.block < 1 or terms.task.mode != ("exact" if tolerance is None else "tolerant"):
            raise LocalProtocolError(f"a game in mode {terms.task.mode} with blocks of {terms.block}")
        check_batches(terms.task, terms.program)
        gauges = tolerance.gauges if tolerance is not None else ()
        self.terms, self.facts = terms, Facts(terms.task, terms.program, terms.segment, gauges)
        self.number = 0
        self.level: Level = "segment"
        self.result: Result | None = None
        self._rungs: list[Rung] = []
        self._bytes = 0
        self._log: list[tuple[int, str, bytes]] = []
        self._bodies: dict[tuple[Side, int], bytes] = {}
        self._shown: dict[Side, Shown] = {}
        self._broken: str | None = None  # what is wrong with the challenger's move, while the solver's is missing
        # The descent: each side's hash of the subtree that is open, and the roots it stands by.
        self._step = self._value = 0
        self._node: dict[Side, bytes | None] = dict.fromkeys(SIDES)
        self._top: dict[Side, bytes] = {"solver": terms.claimed_root, "challenger": terms.found_root}
        self._steps_root: dict[Side, bytes] = {}
        self._trace_root: dict[Side, bytes] = {}
        self._before = terms.in_root
        self._leaf: ShowOperands | None = None
        self._ends: dict[Side, Value] = {}
        self._start: Partial | None = None
        self._chain: Chain | None = None
        self._elements: dict[Side, int] = {}
        self._high: dict[Side, Partial | None] = dict.fromkeys(SIDES)
        self._low = 0
        self._ask: Ask | None = self._tree("steps", leaf=self.facts.ends - 1)
        self.level = "segment"

    # --- what a caller may ask -------------------------------------------------------------------------------
    @property
    def replay(self) -> bool:
        """Whether the open round takes the whole segment: its steps' roots, and the state before the step found."""
        ask = self._ask
        return isinstance(ask, ShowNodes) and (ask.tree == "steps" or (ask.tree == "state" and ask.leaf is not None))

    def owes(self) -> tuple[Side, ...]:
        """The sides whose move of the open round is missing; none once there is a result or only an opening lacks."""
        if self.result is not None or self._ask is None:
            return ()
        return tuple(side for side in SIDES if (side, self.number) not in self._bodies)

    def question(self, side: str) -> bytes | None:
        """What that side's machine must answer now: its move, or the opening at the leaf. None if nothing is owed."""
        if self.result is not None or _side(side) not in (self.owes() or SIDES):
            return None
        ask = self._ask or self._leaf
        assert ask is not None, "a game without a result is at a question or at its leaf"
        terms = self.terms
        return encode(Question(terms.dispute, _side(side), self.number, terms.segment, terms.in_root, ask))

    def wants_opening(self) -> bool:
        """Whether the leaf is reached and its operands are not here."""
        return self.result is None and self._ask is None

    def wants_data(self) -> DataPlace | None:
        """At a disputed batch input: the chunk of the task's data that the opening must hold, as a DataOpening.

        It may be larger than a message, and then no player's machine answers with it: whoever has the data brings it.
        """
        return data_place(self.facts, self._leaf) if self._leaf is not None and self.wants_opening() else None

    def descent(self) -> list[Rung]:
        """Every level that was left, from the step down."""
        return list(self._rungs)

    def transcript(self) -> bytes:
        """The digest of the moves that brought the game to where it is, however they arrived: 32 bytes."""
        log = sorted(self._log)
        return blake("ichiba/transcript", self.terms.dispute, encode([list(entry) for entry in log]))

    # --- what a caller may bring -----------------------------------------------------------------------------
    def take(self, side: str, number: int, body: bytes) -> None:
        """A move. The first of a side and round counts; one of a closed round, or after the result, changes nothing.

        A move of a round to come waits for it. A body that does not parse, or contradicts what its side committed to,
        ends the game: at once for the solver, and for the challenger when the solver's move of the round is in, so that
        the order of arrival decides nothing. Raises LocalProtocolError for a round that no game has.
        """
        mover = _side(side)
        if not 0 <= number < params.DISPUTE_ROUNDS_MAX:
            raise LocalProtocolError(f"a move of round {number}, a game has at most {params.DISPUTE_ROUNDS_MAX}")
        if self.result is not None or (mover, number) in self._bodies or number < self.number:
            return
        self._bodies[mover, number] = body
        while self.result is None and self._ask is not None and self._settle():
            pass

    def open(self, data: bytes) -> None:
        """The operands at the leaf, from anybody. Raises VerificationFailed, MalformedRecord or LimitExceeded, and
        changes nothing, if they do not prove what is read; LocalProtocolError if no opening is wanted."""
        ask = self._leaf
        if not self.wants_opening() or ask is None:
            raise LocalProtocolError("no operands are wanted now")
        agreed = Agreed(self._before, tuple(self._trace_root.values()), self._start, self.terms.in_root)
        finding = judge(self.facts, ask, agreed, data)
        self._bytes += len(data)
        found = finding.result
        if isinstance(found, Bound):
            self._weigh(found, finding.operations)
            return
        chain = self._chain
        if chain is not None and isinstance(found, tuple) and not isinstance(next(iter(self._ends.values())), tuple):
            found = chain.finish(found)
        self._decide(found, finding.operations)

    def forfeit(self, side: str, cause: str) -> None:
        """That side loses by `silence`, `withheld` or `equivocation`. After a result it changes nothing."""
        if cause not in ("silence", "withheld", "equivocation"):
            raise LocalProtocolError(f"nobody forfeits by {cause[:32]}")
        if self.result is None:
            self._end(_side(side), cause)  # type: ignore[arg-type]  # checked above

    # --- rounds ----------------------------------------------------------------------------------------------
    def _settle(self) -> bool:
        """Take what is here of the open round. True if it closed and another may follow."""
        for side in SIDES:
            body = self._bodies.get((side, self.number))
            if body is None or side in self._shown or (side == "challenger" and self._broken is not None):
                continue
            try:
                self._shown[side] = self._checked(side, body)
            except (MalformedRecord, VerificationFailed, LimitExceeded) as error:
                if side == "solver":
                    self._log.append((self.number, side, body))
                    self._bytes += len(body)
                    self._end("solver", "malformed", what=str(error))
                    return False
                self._broken = str(error)
        if any((side, self.number) not in self._bodies for side in SIDES):
            return False
        for side in SIDES:
            self._log.append((self.number, side, self._bodies[side, self.number]))
            self._bytes += len(self._bodies[side, self.number])
        if self._broken is not None:
            self._end("challenger", "malformed", what=self._broken)
            return False
        shown, ask, self._shown = self._shown, self._ask, {}
        self.number += 1
        self.level = "step" if self.level == "segment" else self.level
        if isinstance(ask, ShowNodes):
            self._close_nodes(ask, {side: _revealed(shown[side]) for side in SIDES})
        elif isinstance(ask, ShowTile):
            self._close_tile(ask, {side: _tile(shown[side]) for side in SIDES})
        else:
            assert ask is not None, "a round is open"
            self._close_partials(ask, {side: _partials(shown[side]) for side in SIDES})
        return True

    def _checked(self, side: Side, body: bytes) -> Shown:
        """The body, held against what its side stands by. Raises MalformedRecord, VerificationFailed, LimitExceeded."""
        ask = self._ask
        if isinstance(ask, ShowNodes):
            revealed = decode(Revealed, body, bytes_max=params.MOVE_BYTES_MAX)
            self._check_nodes(side, ask, revealed)
            return revealed
        if isinstance(ask, ShowTile):
            tile = decode(TileShown, body, bytes_max=params.MOVE_BYTES_MAX)
            self._check_tile(side, ask, tile.data)
            return tile
        assert ask is not None, "a round is open"
        partials = decode(Partials, body, bytes_max=params.MOVE_BYTES_MAX)
        self._check_partials(side, ask, partials.states)
        return partials

    def _tree(self, tree: Tree, *, leaf: int | None = None) -> ShowNodes:
        """The question at the top of a tree. Every side is held against its root, `_top`, not yet against a hash."""
        self.level = _LEVELS[tree]
        self._node = dict.fromkeys(SIDES)
        height = merkle.tree_height(self.facts.leaves(tree, self._value))
        return ShowNodes(tree, self._step, self._value, height, 0, leaf)

    def _check_nodes(self, side: Side, ask: ShowNodes, shown: Revealed) -> None:
        facts, count = self.facts, self.facts.leaves(ask.tree, ask.value)
        height, places = children(ask, count)
        if len(shown.nodes) != len(places):
            raise MalformedRecord(f"{len(shown.nodes)} nodes shown where {len(places)} stand")
        hashes = list(shown.nodes) if height else facts.hashes(ask.tree, list(shown.nodes), places.start)
        (root,) = merkle.fold(hashes, ask.height - height)
        committed = self._node[side]
        if committed is not None:
            if root != committed or shown.path or shown.leaf is not None:
                raise VerificationFailed("the nodes shown do not hash to what this side committed to")
            return
        self._check_shown(side, ask, root)
        if ask.tree in ("state", "tiles") and facts.wrapped(ask.tree, ask.value, root) != self._top[side]:
            raise VerificationFailed("the nodes shown do not hash to the root this side stands by")
        if ask.leaf is None:
            if shown.path or shown.leaf is not None:
                raise MalformedRecord("a path that was not asked for")
        elif ask.tree == "state":
            if shown.leaf is None:
                raise MalformedRecord("the root of the state before the step is missing")
            merkle.verify_path(self._steps_root[side], shown.leaf, index=ask.leaf, count=facts.ends, path=shown.path)
        else:
            if shown.leaf is not None:
                raise MalformedRecord("a root that was not asked for")
            merkle.verify_path(root, self._top[side], index=ask.leaf, count=count, path=shown.path)

    def _check_shown(self, side: Side, ask: ShowNodes, root: bytes) -> None:
        """The solver's run is the one it signed before the challenge."""
        before = self.terms.pledge
        if side == "challenger" or before is None:
            return
        other_steps = ask.tree == "steps" and root != before.steps
        if other_steps or (ask.tree == "trace" and ask.step == before.step and root != before.trace):
            raise VerificationFailed("this is not the run that the solver showed before the challenge")

    def _close_nodes(self, ask: ShowNodes, shown: Mapping[Side, Revealed]) -> None:
        height, places = children(ask, self.facts.leaves(ask.tree, ask.value))
        if self._node["solver"] is None:
            self._top_shown(ask, height, places, shown)
        at = _first_difference(shown["solver"].nodes, shown["challenger"].nodes)
        nodes = {side: shown[side].nodes[at] for side in SIDES}
        place = places[at]
        if height:
            self._node = dict(nodes)
            self._ask = ShowNodes(ask.tree, ask.step, ask.value, height, place, None)
        elif ask.tree == "steps":
            self._found_step(place, nodes)
        elif ask.tree == "state":
            self._found_tensor(place, nodes)
        elif ask.tree == "trace":
            self._found_value(place, nodes)
        else:
            self._node = dict(nodes)
            self._found_tile(place, nodes)

    def _top_shown(self, ask: ShowNodes, height: int, places: range, shown: Mapping[Side, Revealed]) -> None:
        """Keep what the top of a tree commits to beside its nodes."""
        for side in SIDES:
            nodes = list(shown[side].nodes)
            hashes = nodes if height else self.facts.hashes(ask.tree, nodes, places.start)
            (root,) = merkle.fold(hashes, ask.height - height)
            if ask.tree == "steps":
                self._steps_root[side] = root
            elif ask.tree == "trace":
                self._trace_root[side] = root
        before = shown["solver"].leaf
        if ask.tree == "state" and before is not None:
            assert before == shown["challenger"].leaf, "both paths lead to what the descent found equal"
            self._before = before

    # --- levels ----------------------------------------------------------------------------------------------
    def _found_step(self, step: int, roots: dict[Side, bytes]) -> None:
        where = "the gauges put back" if self.facts.puts_back(step) else f"step {self.facts.number_of(step)}"
        self._rung(where, roots)
        self._step, self._top = step, roots
        self._ask = self._tree("state", leaf=step - 1 if step else None)

    def _found_tensor(self, place: int, roots: dict[Side, bytes]) -> None:
        facts, update = self.facts, self.facts.program.updates[place]
        if facts.puts_back(self._step):
            self._rung(f"state tensor {update.name}", roots)
            self._open_tiles(facts.state_value(place), roots)
            return
        self._rung(f"state tensor {update.name}", roots, update.value)
        self._value, self._top = update.value, roots
        known = facts.computed_root(update.value, self._step) or facts.empty_root(update.value)
        if known is not None:
            self._at_leaf(0, dict(roots))
            self._decide(known, 1)
        elif facts.trace_leaf(update.value) is None:
            self._at_leaf(0, dict(roots))
        else:
            self._ask = self._tree("trace", leaf=facts.trace_leaf(update.value))

    def _found_value(self, leaf: int, roots: dict[Side, bytes]) -> None:
        value = self.facts.trace_value(leaf)
        self._rung(self._name_of(value), roots, value)
        self._open_tiles(value, roots)

    def _open_tiles(self, value: int, roots: dict[Side, bytes]) -> None:
        self._value, self._top = value, roots
        known = self.facts.empty_root(value) or self.facts.present_root(value, self._step)
        if known is not None:
            self._at_leaf(0, dict(roots))
            self._decide(known, 1)
        elif self.facts.leaves("tiles", value) == 1:
            self.level = "tile"
            self._node = dict.fromkeys(SIDES)
            self._ask = ShowTile(self._step, value, 0)
        else:
            self._ask = self._tree("tiles")

    def _found_tile(self, tile: int, hashes: dict[Side, bytes]) -> None:
        self._rung(f"tile {tile} of {self.facts.leaves('tiles', self._value)}", hashes)
        self._ask = ShowTile(self._step, self._value, tile)

    def _check_tile(self, side: Side, ask: ShowTile, data: bytes) -> None:
        kind, hashed = self.facts.type_of(ask.value), merkle.leaf_hash(data)
        committed = self._node[side]
        if committed is None:  # the only tile of its tensor
            if self.facts.wrapped("tiles", ask.value, hashed) != self._top[side]:
                raise VerificationFailed("the tile shown is not that of the root this side stands by")
        elif hashed != committed:
            raise VerificationFailed("the tile shown does not hash to what this side committed to")
        merkle.check_tile(data, tile=ask.tile, shape=kind.shape, dtype=kind.dtype)

    def _close_tile(self, ask: ShowTile, shown: Mapping[Side, bytes]) -> None:
        kind = self.facts.type_of(ask.value)
        solver, challenger = shown["solver"], shown["challenger"]
        word = next(
            at for at in range(len(solver) // 4) if solver[4 * at : 4 * at + 4] != challenger[4 * at : 4 * at + 4]
        )
        element = merkle.element_at(ask.tile, word, shape=kind.shape, dtype=kind.dtype)
        _, first = merkle.tile_of(element, shape=kind.shape, dtype=kind.dtype)
        self._elements = {side: merkle.tile_element(shown[side], first, dtype=kind.dtype) for side in SIDES}
        self.level = "element"
        self._rung(f"element {element} of {list(kind.shape)}", dict(self._elements), ask.value)
        chain = self.facts.chain(ask.value, element)
        tolerant = self.terms.tolerance is not None  # sums of floats have no order that both share: no search in them
        if tolerant and chain is not None and not fits_opening(chain, self._tile):
            what = f"element {element} of value {ask.value} reads more than {params.OPENING_TILES_MAX} tiles"
            self._end("challenger", "withheld", what=what)  # it chose the place, and nobody can open it
            return
        if chain is None or tolerant:
            self._at_leaf(element, dict(self._elements))
            return
        self._chain = chain
        self.level = "block"
        self._start = chain.start
        self._block(element, 0, chain.terms)

    # --- the search in a reduction ---------------------------------------------------------------------------
    def _block(self, element: int, low: int, high: int) -> None:
        """Between partial result `low`, agreed, and `high`, which is not: ask on, or leave the rest to the referee."""
        chain = self._chain
        assert chain is not None, "only a reduction has partial results"
        if high - low <= self.terms.block and tiles_read(chain, low, high, self._tile) <= params.OPENING_TILES_MAX:
            self._ends = dict(self._elements) if self._high["solver"] is None else dict(self._high)
            self._ask, self._leaf = None, ShowOperands(self._step, self._value, element, low, high)
            return
        cuts = {low + -(-(high - low) * part // params.DISPUTE_ARITY) for part in range(1, params.DISPUTE_ARITY + 1)}
        self._low = low
        self._ask = ShowPartials(self._step, self._value, element, tuple(sorted(cuts)))

    def _tile(self, place: tuple[int, int]) -> tuple[int, int]:
        value, element = place
        kind = self.facts.type_of(value)
        return value, merkle.tile_of(element, shape=kind.shape, dtype=kind.dtype)[0]

    def _check_partials(self, side: Side, ask: ShowPartials, states: tuple[Partial, ...]) -> None:
        chain = self._chain
        assert chain is not None, "only a reduction has partial results"
        if len(states) != len(ask.positions):
            raise MalformedRecord(f"{len(states)} partial results shown, {len(ask.positions)} asked for")
        for state in states:
            if len(state) != len(chain.bounds):
                raise MalformedRecord(f"a partial result of {len(state)} numbers, not {len(chain.bounds)}")
            if not all(low <= number <= high for number, (low, high) in zip(state, chain.bounds, strict=True)):
                raise MalformedRecord("a partial result that no terms have")
        committed = self._high[side]
        if committed is not None and states[-1] != committed:
            raise VerificationFailed("the last partial result is not the one this side showed before")

    def _close_partials(self, ask: ShowPartials, shown: Mapping[Side, tuple[Partial, ...]]) -> None:
        chain = self._chain
        assert chain is not None, "only a reduction has partial results"
        if self._high["solver"] is None:  # the last one must give the element, by the one scaling
            for side in SIDES:
                given = chain.finish(shown[side][-1])
                if given != self._elements[side]:
                    self._rung(f"the scaling of the {side}'s own sum", self._elements, self._value, given)
                    self._end(side, "leaf", what=f"the {side}'s sum gives {given}, not its element", operations=1)
                    return
        at = _first_difference(shown["solver"], shown["challenger"])
        if at:
            self._start = shown["solver"][at - 1]
        self._high = {side: shown[side][at] for side in SIDES}
        low = ask.positions[at - 1] if at else self._low
        self._rung(f"terms {low} to {ask.positions[at]} of {chain.terms}", dict(self._high))
        self._block(ask.element, low, ask.positions[at])

    # --- the end ---------------------------------------------------------------------------------------------
    def _at_leaf(self, element: int, ends: dict[Side, Value]) -> None:
        self._ends, self._ask = ends, None
        self._leaf = ShowOperands(self._step, self._value, element, 0, 0)

    def _decide(self, found: Value, operations: int) -> None:
        solver, challenger = self._ends["solver"], self._ends["challenger"]
        loser: Side = "challenger" if solver == found else "solver"
        self._rung("the referee's leaf", self._ends, self._value, found)
        both = solver != found and challenger != found
        self._end(loser, "leaf", both_wrong=both, operations=operations)

    def _weigh(self, bound: Bound, operations: int) -> None:
        """In tolerant mode: the solver's element stands if an honest machine may have it, whatever the other's is."""
        dtype, told = self.facts.type_of(self._value).dtype, {}
        for side in SIDES:
            element = self._ends[side]
            assert isinstance(element, int), "a node's leaf is an element"
            try:
                check_within(element, bound, dtype, f"the {side}'s element")
            except VerificationFailed as error:
                told[side] = error.what
        self._rung("the referee's leaf", self._ends, self._value)
        loser: Side = "solver" if "solver" in told else "challenger"
        what = told.get(loser, "an honest machine may have the solver's element")
        self._end(loser, "leaf", both_wrong=len(told) == 2, operations=operations, what=what)

    def _end(self, loser: Side, cause: Cause, *, what: str = "", both_wrong: bool = False, operations: int = 0) -> None:
        self.result = Result(loser, cause, self.level, self._bytes + operations, both_wrong, what)

    def _rung(self, where: str, values: Mapping[Side, Value], value: int | None = None, referee: Value = None) -> None:
        node = self.facts.node(value) if value is not None else None
        op, source = (node.op, node.source) if node is not None else ("", "")
        self._rungs.append(Rung(self.level, where, values["solver"], values["challenger"], referee, op, source))

    def _name_of(self, value: int) -> str:
        item = self.facts.input(value)
        return f"batch input {item.name}" if item is not None else f"node {value - self.facts.program.first_node}"


def _side(side: str) -> Side:
    if side not in SIDES:
        raise LocalProtocolError(f"no side is called {side[:32]!r}")
    return side


def _first_difference(solver: tuple[Value, ...], challenger: tuple[Value, ...]) -> int:
    """Where two lists first differ. They do: their parents, or their ends, differed."""
    return next(at for at, (a, b) in enumerate(zip(solver, challenger, strict=True)) if a != b)


def _revealed(shown: Shown) -> Revealed:
    assert isinstance(shown, Revealed)
    return shown


def _tile(shown: Shown) -> bytes:
    assert isinstance(shown, TileShown)
    return shown.data


def _partials(shown: Shown) -> tuple[Partial, ...]:
    assert isinstance(shown, Partials)
    return shown.states
