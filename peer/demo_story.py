"""What a job's events mean to a person: one sentence for each that matters, and the state of things as a picture.

Pure: events in, lines out; no clock, no terminal, no client. The same story is told line by line to a file and under
a moving loss curve to a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.credits import credits_of

__all__ = ["Story", "curve", "money_rows", "sparkline"]

BLOCKS: Final = " ▁▂▃▄▅▆▇█"
Event = Mapping[str, Any]


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as at most `width` block letters, lowest value lowest; each letter is the mean of its share."""
    (line,) = curve(values, width=width, height=1, total=0) or [""]
    return line


def curve(values: Sequence[float], *, width: int, height: int, total: int) -> list[str]:
    """`values` as a picture of `height` lines of `width` letters, with room left for `total` values in all.

    Empty for no values. The lowest value keeps one eighth of a letter, so that a point is never invisible.
    """
    if not values:
        return []
    low, high = min(values), max(values)
    span = high - low or 1.0
    columns = min(width, max(total, len(values)))
    heights: list[int] = []
    for column in range(columns):
        start = column * max(total, len(values)) // columns
        stop = max(start + 1, (column + 1) * max(total, len(values)) // columns)
        share = values[start:stop]
        if not share:
            break
        mean = sum(share) / len(share)
        heights.append(1 + round((mean - low) / span * (8 * height - 1)))
    rows = []
    for row in reversed(range(height)):
        rows.append("".join(BLOCKS[max(0, min(8, tall - 8 * row))] for tall in heights))
    return rows


def money_rows(table: Mapping[str, Any], name_of: Callable[[str], str]) -> list[list[str]]:
    """The wallet's table for people: name, deposited, earned, awarded, paid, slashed, held; then the sums.

    The last rows are what nobody owns (burned, pool) and the total, whose held equals its deposited.
    """

    def cells(name: str, row: Mapping[str, int], held: int) -> list[str]:
        kinds = ("deposited_micro", "earned_micro", "awarded_micro", "paid_micro", "slashed_micro")
        return [name, *(credits_of(row[kind]) if row[kind] else "" for kind in kinds), credits_of(held)]

    rows = [cells(name_of(row["name"]), row, held_micro(row)) for row in table["rows"]]
    rows.sort()
    for what in ("burned", "pool"):
        if table[f"{what}_micro"]:
            rows.append([f"({what})", "", "", "", "", "", credits_of(table[f"{what}_micro"])])
    total = held_micro(table["totals"]) + table["burned_micro"] + table["pool_micro"]
    rows.append(cells("total", table["totals"], total))
    return rows


def named(segments: Sequence[int]) -> str:
    """Segments in words: segment 3; segments 3 and 8."""
    return f"segment{'s' if len(segments) > 1 else ''} {' and '.join(map(str, segments))}"


def held_micro(row: Mapping[str, int]) -> int:
    """All a peer owns, spendable or not."""
    return sum(row.get(f"{bucket}_micro", 0) for bucket in ("free", "stake", "unbonding", "channels", "locks"))


@dataclass
class Story:
    """One job as its submitter sees it. `names` gives a peer of the network its name in the swarm."""

    names: Callable[[str], str]
    steps: int
    segments: int
    losses: dict[int, float] = field(default_factory=dict)  # step -> loss, of the work that still counts
    by_deal: dict[str, dict[int, float]] = field(default_factory=dict)
    solver: str = ""
    stage: str = "starting"
    paid: dict[str, int] = field(default_factory=dict)  # solver -> micro-credits in vouchers of its latest deal
    receipts: int = 0
    agreed_ms: list[float] = field(default_factory=list)
    slashed_micro: int = 0
    culprits: list[str] = field(default_factory=list)
    retried: int = 0
    drawn: dict[str, list[int]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    disputes: list[str] = field(default_factory=list)  # that notaries ruled on
    ended: str = ""
    reason: str = ""

    @property
    def steps_done(self) -> int:
        """Steps whose loss is known, of the work that still counts."""
        return len(self.losses)

    @property
    def loss_line(self) -> list[float]:
        """The losses in the order of their steps."""
        return [self.losses[step] for step in sorted(self.losses)]

    def take(self, event: Event) -> list[str]:
        """Note one event; the lines that tell it, if it is worth telling."""
        teller = getattr(self, "_on_" + str(event["kind"]).replace("-", "_"), None)
        return list(teller(event)) if teller is not None else []

    def _name(self, peer: str) -> str:
        return self.names(peer)

    # --- the market ----------------------------------------------------------------------------------------
    def _on_offer(self, event: Event) -> list[str]:
        first, last = event["segments"]
        self.stage = "in the market"
        return [
            f"offer      segments {first} to {last - 1}: {event['operations'] / 1e9:,.0f} giga-operations at "
            f"{credits_of(event['unit_price_max'])} credits each at most"
        ]

    def _on_round(self, event: Event) -> list[str]:
        lines = []
        for place, bid in enumerate(event["ranked"]):
            score = bid["price"] + bid["risk"] + bid["wait"] + bid["transfer"]
            lines.append(
                f"bid        {self._name(bid['solver'])}: price {credits_of(bid['price'])} + risk "
                f"{credits_of(bid['risk'])} + waiting {credits_of(bid['wait'])} = {credits_of(score)}"
                f"{'  <- best' if place == 0 else ''}"
            )
        lines += [f"refused    {self._name(one['solver'])} ({one['code']}): {one['why']}" for one in event["refused"]]
        return lines or ["bids       none yet"]

    def _on_matched(self, event: Event) -> list[str]:
        self.solver = self._name(event["solver"])
        return [f"match      {self.solver}, for {credits_of(event['unit_price'])} credits a giga-operation"]

    def _on_agreed(self, event: Event) -> list[str]:
        self.agreed_ms.append(event["after_ns"] / 1e6)
        self.solver, self.stage = self._name(event["solver"]), "training"
        return [
            f"agreed     {self.agreed_ms[-1]:,.0f} ms after the offer was gossiped; both signed, the channel is funded"
        ]

    def _on_refused(self, event: Event) -> list[str]:
        who = event.get("solver") or event.get("checker") or "somebody"
        return [f"refused    {self._name(who)} ({event['code']}): {event['why']}"]

    # --- the work ------------------------------------------------------------------------------------------
    def _on_step(self, event: Event) -> list[str]:
        self.losses[event["step"]] = event["loss"]
        self.by_deal.setdefault(event["deal"], {})[event["step"]] = event["loss"]
        return []

    def _on_paid(self, event: Event) -> list[str]:
        self.receipts += 1
        self.paid[self.solver] = event["cumulative_micro"]
        return [
            f"paid       segment {event['segment']} ({event['segment'] + 1}/{self.segments}), state "
            f"{event['out_root'][:8]}: {self.solver} has {credits_of(event['cumulative_micro'])} credits so far"
        ]

    def _on_lost(self, event: Event) -> list[str]:
        self.stage = "solver lost"
        return [f"lost       {self._name(event['solver'])}: {event['why']}; {event['receipts']} segments are receipted"]

    def _on_problem(self, event: Event) -> list[str]:
        return [f"problem    {event['what']}"]

    # --- verification --------------------------------------------------------------------------------------
    def _on_proof(self, event: Event) -> list[str]:
        self.stage = "proved"
        return [f"proof      one root over {event['receipts']} checkpoints, committed before anybody knows the draw"]

    def _on_forfeit(self, event: Event) -> list[str]:
        return [f"forfeit    {event['why']}: the draw goes without it"]

    def _on_draw(self, event: Event) -> list[str]:
        self.stage = "being verified"
        self.drawn[event["deal"]] = list(event["segments"])
        return [f"draw       {named(event['segments'])}, by the proof and both parties' secret seeds"]

    def _on_check(self, event: Event) -> list[str]:
        return [f"check      {self._name(event['checker'])} re-executes {named(event['segments'])}"]

    def _on_verdict(self, event: Event) -> list[str]:
        who = self._name(event["checker"])
        self.findings.append(event["finding"])
        if event["finding"] == "wrong":
            return [f"verdict    {who}: WRONG. Segment {event['wrong_segment']} does not give the state it claims"]
        return [f"verdict    {who}: right, bit for bit ({named(event['segments'])})"]

    def _on_challenged(self, event: Event) -> list[str]:
        self.stage = "in dispute"
        return [
            f"challenge  {self._name(event['challenger'])} stakes that segment {event['segment']} is wrong; the "
            "notaries let both sides name the first operation on which they differ"
        ]

    def _on_arbitrated(self, event: Event) -> list[str]:
        self.disputes.append(event["dispute"])
        return [f"ruling     by a quorum of notaries: the work on segment {event['segment']} is {event['finding']}"]

    def _on_waiting(self, event: Event) -> list[str]:
        return [f"waiting    {event['why']}"]

    # --- the end -------------------------------------------------------------------------------------------
    def _on_slashed(self, event: Event) -> list[str]:
        culprit = self._name(event["solver"])
        self.culprits.append(culprit)
        self.slashed_micro += event["lock_micro"]
        self.paid.pop(culprit, None)
        for step in self.by_deal.pop(event["deal"], {}):
            self.losses.pop(step, None)
        return [f"SLASHED    {culprit} loses its locked stake of {credits_of(event['lock_micro'])} credits and all pay"]

    def _on_reoffer(self, event: Event) -> list[str]:
        self.retried += 1
        return [f"again      from segment {event['segment']}: {event['why']}"]

    def _on_claim(self, event: Event) -> list[str]:
        return [f"claim      the channel is closed alone: {event['why']}"]

    def _on_settled(self, event: Event) -> list[str]:
        return self._closed(event, "settled    both signed:")

    def _on_claimed(self, event: Event) -> list[str]:
        return self._closed(event, "claimed    the window is over:")

    def _closed(self, event: Event, how: str) -> list[str]:
        fees = ", ".join(f"{credits_of(fee['micro'])} to {self._name(fee['peer'])}" for fee in event["fees"])
        paid = f"{credits_of(event['paid_micro'])} to {self._name(event['solver'])}"
        return [f"{how} {paid}{', ' + fees if fees else ''}; the rest goes back"]

    def _on_done(self, event: Event) -> list[str]:
        self.ended = self.stage = "done"
        return [f"done       final state {event['final_root'][:16]}"]

    def _on_failed(self, event: Event) -> list[str]:
        self.ended, self.reason, self.stage = "failed", event["reason"], "failed"
        return [f"failed     {event['reason']}"]

    def _on_cancelled(self, event: Event) -> list[str]:
        self.ended, self.reason, self.stage = "cancelled", event["reason"], "cancelled"
        return [f"cancelled  {event['reason']}"]

    # --- the picture ---------------------------------------------------------------------------------------
    def picture(self, width: int, height: int) -> list[str]:
        """The loss curve with its scale, and one line of progress. Empty before the first step."""
        losses = self.loss_line
        rows = curve(losses, width=width - 8, height=height, total=self.steps)
        if not rows:
            return []
        labels = {0: f"{max(losses):6.2f} ", height - 1: f"{min(losses):6.2f} "}
        drawn = [labels.get(number, " " * 7) + "│" + row for number, row in enumerate(rows)]
        return [*drawn, f"{' ' * 7}└{'─' * (width - 8)}", f"{' ' * 8}{self.progress}"]

    @property
    def progress(self) -> str:
        """How far it is, in one line."""
        newest = self.losses[max(self.losses)] if self.losses else float("nan")
        return f"step {self.steps_done}/{self.steps}, loss {newest:.3f}, {self.stage} ({self.solver})"
