"""The moves of a search for a placement: swap two devices, turn or shift a stretch of the path, and price only what
changed.

market/c/placement.c does the same, function by function, thousands of times faster; tests compare every array after
every kind of move. Where the compiled moves are missing these give the same plan for the same number of moves. A move
is taken unless it costs more than a limit drawn beforehand (the plan's cost plus temperature times an exponential
deviate), so most moves are refused by a lower bound long before their exact cost is known. Refuses to know
temperatures, rounds and clocks.

Bottleneck matchings are kept, not found anew. Of each boundary the state has a best matching and Hall's witness that
none is better (market/placement_state.py). A swap changes one row, or one column, or both; where the witness still
stands and the matching's new edges are no larger, the value is the old one; else the matching is repaired from where
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from market.placement_state import State

__all__ = ["Moves"]

_MASK: Final = 2**64 - 1
_PLAN: Final = (
    "slots", "slot_of", "order", "place", "boundary", "tight", "matching", "rows", "sync", "slowest", "totals", "known",
    "witness", "best_slots", "best_order",
)  # fmt: skip


@dataclass
class _Trial:
    """What one swap would do to the boundary of groups first < second. row, column: the slot that changes there, or
    -1."""

    pair: int
    first: int
    second: int
    row: int
    column: int
    value: int = 0
    tight: int = 0
    bound: int = -1
    repaired: bool = False


class Moves:
    """A state's arrays as lists while moves are made: numpy is slow one number at a time. Call `done` at the end."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.devices, self.groups, self.size = state.devices, state.groups, state.size
        self.partner: list[list[int]] = state.lists["partner"]
        self.hop: list[list[int]] = state.lists["hop"]
        self.near: list[list[int]] = state.lists["near"]
        self.work: list[int] = state.work.tolist()
        self.toll: list[int] = state.toll.tolist()
        self.patience: list[int] = state.patience.tolist()
        self.slots: list[int]
        self.slot_of: list[int]
        self.order: list[int]
        self.place: list[int]
        self.boundary: list[int]
        self.tight: list[int]
        self.matching: list[int]
        self.rows: list[int]
        self.sync: list[int]
        self.slowest: list[int]
        self.totals: list[int]
        self.known: list[int]
        self.witness: list[int]
        self.best_slots: list[int]
        self.best_order: list[int]
        for name in _PLAN:
            setattr(self, name, getattr(state, name).tolist())
        self.random = int(state.random[0])

    def done(self) -> None:
        """Put everything back into the state's arrays."""
        for name in _PLAN:
            getattr(self.state, name)[:] = getattr(self, name)
        self.state.random[0] = self.random

    def anneal(self, moves: int, temperature: int) -> None:
        """So many moves. temperature: in units of cost."""
        for _ in range(moves):
            self._move(temperature)

    # --- draws ---
    def _draw(self) -> int:
        """Marsaglia's xorshift64 (2003)."""
        word = self.random
        word ^= word << 13 & _MASK
        word ^= word >> 7
        word ^= word << 17 & _MASK
        self.random = word
        return word

    def _below(self, count: int) -> int:
        return (self._draw() >> 32) * count >> 32

    # --- bottleneck matchings ---
    def _group(self, group: int) -> list[int]:
        return self.slots[group * self.size : (group + 1) * self.size]

    def _pair(self, g: int, h: int) -> int:
        return g * self.groups + h if g < h else h * self.groups + g

    def _settle(self, first: int, second: int, match: list[int], witness: list[int], bound: int) -> tuple[int, int]:
        """Make `match` (column of each row) one whose largest edge is least: (that edge, its row). None is below
        `bound`.

        As market.placement_cost.bottleneck, and leaves Hall's witness where it looked for one.
        """
        size, left, right, hop = self.size, self._group(first), self._group(second), self.hop
        holder = [0] * size
        for row, column in enumerate(match):
            holder[column] = row
        while True:
            edges = [hop[left[i]][right[match[i]]] for i in range(size)]
            value = max(edges)
            row = edges.index(value)
            if value <= bound:
                return value, row
            column = match[row]
            found, cost, came, seen = self._reroute(left, right, match, holder, row, value)
            if found < 0:
                self._testify(holder, row, seen, cost, value, witness)
                return value, row
            if found >= bound:
                self._testify(holder, row, seen, cost, found, witness)
            while True:
                taker = came[column]
                follows = match[taker]
                match[taker], holder[column] = column, taker
                if taker == row:
                    break
                column = follows

    def _reroute(
        self, left: list[int], right: list[int], match: list[int], holder: list[int], row: int, most: int
    ) -> tuple[int, list[int], list[int], list[bool]]:
        """The alternating path from `row` to its column whose largest edge is least, if below `most`, else -1 first."""
        size, goal, edges = self.size, match[row], self.hop[left[row]]
        cost, came, seen = [edges[device] for device in right], [row] * size, [False] * size
        while True:
            least, at = most, -1
            for column in range(size):
                if not seen[column] and cost[column] < least:
                    least, at = cost[column], column
            if at < 0:
                return -1, cost, came, seen
            if at == goal:
                return least, cost, came, seen
            seen[at] = True
            edges = self.hop[left[holder[at]]]
            for column in range(size):
                edge = max(edges[right[column]], least)
                if not seen[column] and edge < cost[column]:
                    cost[column], came[column] = edge, holder[at]

    def _testify(
        self, holder: list[int], row: int, seen: list[bool], cost: list[int], value: int, witness: list[int]
    ) -> None:
        size = self.size
        witness[:] = [0] * (2 * size)
        witness[row] = 1
        for column in range(size):
            if seen[column] and cost[column] < value:
                witness[size + column] = witness[holder[column]] = 1

    def boundary_of(self, g: int, h: int) -> int:
        """The bottleneck of two groups, found now if it is not known."""
        pair, size = self._pair(g, h), self.size
        if not self.known[pair]:
            match = self.matching[pair * size : (pair + 1) * size]
            witness = [0] * (2 * size)
            self.boundary[pair], self.tight[pair] = self._settle(min(g, h), max(g, h), match, witness, -1)
            self.matching[pair * size : (pair + 1) * size] = match
            self.witness[2 * pair * size : 2 * (pair + 1) * size] = witness
            self.known[pair] = 1
        return self.boundary[pair]

    def _stands(self, t: _Trial) -> bool:
        """Whether the witness of a boundary still stands after the devices in slots t.row and t.column changed."""
        size, at = self.size, 2 * t.pair * self.size
        rows, columns = self.witness[at : at + size], self.witness[at + size : at + 2 * size]
        left, right, value = self._group(t.first), self._group(t.second), self.boundary[t.pair]
        if t.row >= 0 and rows[t.row]:
            edges = self.hop[left[t.row]]
            if any(not columns[c] and edges[right[c]] < value for c in range(size)):
                return False
        if t.column >= 0 and not columns[t.column]:
            edges = self.hop[right[t.column]]
            return not any(rows[i] and edges[left[i]] < value for i in range(size))
        return True

    def _floor(self, t: _Trial) -> int:
        """At least what it will cost: the old value where the witness stands, and the newcomers' cheapest edges."""
        left, right = self._group(t.first), self._group(t.second)
        least = t.bound = self.boundary[t.pair] if self._stands(t) else -1
        if t.row >= 0:
            edges = self.hop[left[t.row]]
            least = max(least, min(edges[device] for device in right))
        if t.column >= 0:
            edges = self.hop[right[t.column]]
            least = max(least, min(edges[device] for device in left))
        return least

    def _unmoved(self, t: _Trial) -> bool:
        """Whether the old matching is still a best one, so that the value stays: found without a search."""
        left, right, value, size = self._group(t.first), self._group(t.second), self.boundary[t.pair], self.size
        match = self.matching[t.pair * size : (t.pair + 1) * size]
        if t.bound != value:
            return False
        if t.row >= 0 and self.hop[left[t.row]][right[match[t.row]]] > value:
            return False
        if t.column >= 0 and self.hop[left[match.index(t.column)]][right[t.column]] > value:
            return False
        t.value, t.tight = value, self.tight[t.pair]
        if self.hop[left[t.tight]][right[match[t.tight]]] != value:
            t.tight = next(i for i in range(size) if self.hop[left[i]][right[match[i]]] == value)
        return True

    # --- moves ---
    def keep_best(self) -> None:
        """Remember the plan if it is the best so far."""
        if self.totals[0] < self.totals[1]:
            self.totals[1] = self.totals[0]
            self.best_slots, self.best_order = self.slots[:], self.order[:]

    def _synced(self, group: int, slot: int, goes: int, comes: int) -> tuple[int, list[int]]:
        """The largest row sum of a group, and all, once `comes` has taken `slot` from `goes`."""
        more, less, at = self.partner[comes], self.partner[goes], slot - group * self.size
        members = self._group(group)
        rows = [self.rows[device] - less[device] + more[device] for device in members]
        rows[at] = sum(more[device] for i, device in enumerate(members) if i != at)
        return max(0, *rows), rows

    def _slowest(self, group: int, slot: int, comes: int) -> int:
        members = self._group(group)
        members[slot - group * self.size] = comes
        return max(self.work[device] for device in members)

    def _touched(self, a: int, b: int, slot_a: int, slot_b: int) -> list[_Trial]:
        """The boundaries of the path that touch group a or b (-1: no group)."""
        found = []
        slot_in = {a: slot_a - a * self.size, b: slot_b - b * self.size}
        for own in (a, b) if b >= 0 else (a,):
            for at in (self.place[own] - 1, self.place[own] + 1):
                if not 0 <= at < self.groups or (own == b and self.order[at] == a):
                    continue
                g, h = sorted((own, self.order[at]))
                found.append(_Trial(g * self.groups + h, g, h, slot_in.get(g, -1), slot_in.get(h, -1)))
        return found

    def _weigh(self, trials: list[_Trial], energy: int, limit: int) -> tuple[int, list[tuple[list[int], list[int]]]]:
        """The energy with the boundaries' exact values, and repaired matchings and witnesses; cut short beyond
        `limit`."""
        made: list[tuple[list[int], list[int]]] = []
        for t in trials:
            t.value = self._floor(t)
            energy += t.value
            if energy > limit:
                return energy, made
        for t in trials:
            floor, size = t.value, self.size
            match = self.matching[t.pair * size : (t.pair + 1) * size]
            witness = self.witness[2 * t.pair * size : 2 * (t.pair + 1) * size]
            t.repaired = not self._unmoved(t)
            if t.repaired:
                t.value, t.tight = self._settle(t.first, t.second, match, witness, t.bound)
            made.append((match, witness))
            energy += t.value - floor
            if energy > limit:
                return energy, made
        return energy, made

    def _swap(self, slot_a: int, slot_b: int, limit: int) -> None:
        """Swap the devices of two slots of different groups, the second perhaps of a spare, unless that passes
        `limit`."""
        a, b, x, y = slot_a // self.size, slot_b // self.size, self.slots[slot_a], self.slots[slot_b]
        b = b if b < self.groups else -1
        sync_a, rows_a = self._synced(a, slot_a, x, y)
        slow_a = self._slowest(a, slot_a, y)
        energy = self.totals[0] + slow_a - self.slowest[a]
        sync_b, rows_b, slow_b = 0, [0], 0
        if b >= 0:
            sync_b, rows_b = self._synced(b, slot_b, y, x)
            slow_b = self._slowest(b, slot_b, x)
            energy += slow_b - self.slowest[b]
        else:
            energy += self.toll[y] - self.toll[x]
        rest = max((value for g, value in enumerate(self.sync) if g not in (a, b)), default=0)
        energy += max(sync_a, sync_b, rest) - max(self.sync)
        trials = self._touched(a, b, slot_a, slot_b)
        energy -= sum(self.boundary[t.pair] for t in trials)
        if energy > limit:
            return
        self.slots[slot_a], self.slots[slot_b] = y, x
        energy, made = self._weigh(trials, energy, limit)
        if energy > limit:
            self.slots[slot_a], self.slots[slot_b] = x, y
            return
        self.slot_of[x], self.slot_of[y] = slot_b, slot_a
        self._renew(a, sync_a, slow_a, rows_a)
        if b >= 0:
            self._renew(b, sync_b, slow_b, rows_b)
        else:
            self.rows[x] = 0
        for t, (match, witness) in zip(trials, made, strict=True):
            if t.repaired:
                self.matching[t.pair * self.size : (t.pair + 1) * self.size] = match
                self.witness[2 * t.pair * self.size : 2 * (t.pair + 1) * self.size] = witness
            self.boundary[t.pair], self.tight[t.pair], self.known[t.pair] = t.value, t.tight, 1
        self._arrive(energy)

    def _arrive(self, energy: int) -> None:
        self.totals[0] = energy
        self.keep_best()

    def _renew(self, group: int, sync: int, slow: int, rows: list[int]) -> None:
        """Take the new row sums of a group, and forget what its boundaries cost."""
        for device, row in zip(self._group(group), rows, strict=True):
            self.rows[device] = row
        self.sync[group], self.slowest[group] = sync, slow
        for other in range(self.groups):
            self.known[self._pair(group, other)] = 0

    def _reverse(self, i: int, j: int, limit: int) -> None:
        """Turn the stretch of the path from place i to place j > i round."""
        order, energy = self.order, self.totals[0]
        if i > 0:
            energy += self.boundary_of(order[i - 1], order[j]) - self.boundary_of(order[i - 1], order[i])
        if j < self.groups - 1:
            energy += self.boundary_of(order[i], order[j + 1]) - self.boundary_of(order[j], order[j + 1])
        if energy > limit:
            return
        order[i : j + 1] = order[i : j + 1][::-1]
        for at in range(i, j + 1):
            self.place[order[at]] = at
        self._arrive(energy)

    def _relocate(self, i: int, j: int, limit: int) -> None:
        """Take the group at place i out of the path and put it in at place j."""
        order, energy, last = self.order, self.totals[0], self.groups - 1
        g, before = order[i], j if j > i else j - 1
        after = before + 1
        if i > 0:
            energy -= self.boundary_of(order[i - 1], g)
        if i < last:
            energy -= self.boundary_of(g, order[i + 1])
        if 0 < i < last:
            energy += self.boundary_of(order[i - 1], order[i + 1])
        if before >= 0 and after <= last:
            energy -= self.boundary_of(order[before], order[after])
        if before >= 0:
            energy += self.boundary_of(order[before], g)
        if after <= last:
            energy += self.boundary_of(g, order[after])
        if energy > limit:
            return
        order.insert(j, order.pop(i))
        for at in range(min(i, j), max(i, j) + 1):
            self.place[order[at]] = at
        self._arrive(energy)

    def _critical_slot(self, side: int) -> int:
        """A slot that decides the cost: of a boundary's tightest pair, or of the group that takes longest to agree."""
        at, size = self._below(self.groups), self.size
        if at < self.groups - 1:
            pair = self._pair(self.order[at], self.order[at + 1])
            first, second = divmod(pair, self.groups)
            row = self.tight[pair]
            return first * size + row if side else second * size + self.matching[pair * size + row]
        worst = self.sync.index(max(self.sync))
        rows = [self.rows[device] for device in self._group(worst)]
        return worst * size + rows.index(max(rows))

    def _partner_slot(self, slot: int) -> int:
        if self._draw() & 1023 < self.state.near_share:
            rank = self._below(1 + self._below(self.state.near_count))
            return self.slot_of[self.near[self.slots[slot]][rank]]
        other, start = self._below(self.devices - self.size), slot // self.size * self.size
        return other if other < start else other + self.size

    def _move(self, temperature: int) -> None:
        word = self._draw()
        limit = self.totals[0] + (temperature * self.patience[word >> 52] >> 16)
        if self.groups > 1 and word & 1023 < self.state.path_share:
            i, j = self._below(self.groups), self._below(self.groups)
            if i == j:
                return
            if word >> 20 & 1:
                self._reverse(min(i, j), max(i, j), limit)
            else:
                self._relocate(i, j, limit)
            return
        guided = word >> 10 & 1023 < self.state.guided_share
        slot = self._critical_slot(word >> 20 & 1) if guided else self._below(self.groups * self.size)
        other = self._partner_slot(slot)
        if other // self.size != slot // self.size:
            self._swap(slot, other, limit)
