"""`ichiba audit match`: a match made again from the signed offer and bids, by anybody, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, common, short_id, write_whole
from protocol.errors import IchibaError, MalformedRecord, NotFound

if TYPE_CHECKING:
    from market.audit import Audit, Match
    from market.placing import Placing, PlacingAudit

__all__ = ["audit"]


class _NothingToAudit(IchibaError):
    code = "usage"
    exit_code = 2


@click.group()
def audit() -> None:
    """Make a match again from its signed bids, here or elsewhere."""


@audit.command("match")
@click.argument("job", required=False)
@click.option("--file", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An export.")
@click.option("--export", type=click.Path(dir_okay=False, path_type=Path), help="Write the last match of JOB here.")
@common
def match_(terminal: Terminal, job: str | None, source: Path | None, export: Path | None) -> None:
    """Make each match of JOB again, and say who ranked where and why others could not win.

    Offer, bids and agreement are checked by their signatures. What the submitter knew besides (histories, speeds, who
    was connected) is its own word: it is shown, so that you can compare it with what your peer knows. The units of a
    parallel job are placed together: of such a job each placing is made again, from the signed offers, bids and reports
    of links.

    \b
    ichiba audit match 3fa2
    ichiba audit match 3fa2 --export match.bin
    ichiba audit match --file match.bin
    """
    from market.audit import Match, check_match, read_match
    from market.placing import check_placing, left_out_of, read_placing

    if (job is None) == (source is None):
        raise _NothingToAudit(
            "give a JOB of this peer or a --file that was exported", next_step="ichiba audit match --help"
        )
    if source is not None:
        data = source.read_bytes()
        made = _read(data)
        if isinstance(made, Match):
            _show(terminal, "", check_match(made))
        else:
            _show_placing(terminal, [], check_placing(made), made, left_out_of(data))
        return
    with terminal.client() as client:
        told = client.matches(str(job))
    found, placings = told["matches"], told["placings"]
    if not found and not placings:
        raise NotFound("no match of this job is kept here", next_step="ichiba why JOB")
    for one in found:
        _show(terminal, one["deal"], check_match(read_match(bytes.fromhex(one["match"]))))
    kept = [one for one in placings if one["placing"]]
    for one in placings:
        if one["placing"]:
            data = bytes.fromhex(one["placing"])
            placing = read_placing(data)
            _show_placing(terminal, one["deals"], check_placing(placing), placing, left_out_of(data))
        else:
            terminal.record("ichiba.placing-not-kept/1", {"deals": one["deals"], "why": one["not_kept"]})
            terminal.say(one["not_kept"])
    if not found and not kept:
        why = placings[-1]["not_kept"]
        raise NotFound("no placing of this job can be made again", why=why, next_step="ichiba job show JOB")
    if export is not None:
        write_whole(export, bytes.fromhex(found[-1]["match"] if found else kept[-1]["placing"]))
        terminal.note(f"the last match is in {export}; anybody can check it with `ichiba audit match --file {export}`")


def _read(data: bytes) -> Match | Placing:
    """An export of either kind. Raises MalformedRecord."""
    from market.audit import read_match
    from market.placing import read_placing

    try:
        return read_match(data)
    except MalformedRecord:
        return read_placing(data)


def _show_placing(
    terminal: Terminal, deals: list[str], made: PlacingAudit, placing: Placing, left_out: int
) -> None:
    played = made.round
    unasked = {unit for unit, deal in zip(sorted(made.chosen), deals, strict=False) if not deal}
    units: list[dict[str, Any]] = [
        {
            "unit": unit,
            "stage": unit // played.replicas,
            "replica": unit % played.replicas,
            "solver": (made.chosen[unit].bid.solver if unit in made.chosen else played.solvers[unit]).hex(),
            "toll_micro": made.chosen[unit].toll_micro if unit in made.chosen else 0,
            "bids": len(played.scored.get(unit, ())),
            "refused": [{"code": r.code, "why": r.why} for r in played.refused.get(unit, ())],
            "placed": unit in made.chosen and unit not in unasked,
            "overtaken": unit in unasked,
        }
        for unit in range(played.stages * played.replicas)
    ]
    terminal.record(
        "ichiba.placing/1",
        {
            "run": placing.run.hex(), "deals": deals, "cost_micro": made.cost_micro, "best_micro": made.best_micro,
            "reports": len(placing.reports), "left_out": left_out, "same": True, "units": units,
        },
    )  # fmt: skip
    terminal.table(
        f"placing of run {short_id(placing.run.hex())}",
        (">unit", "stage", "replica", "solver", ">asks", ">bids", ">refused", ""),
        [
            (
                one["unit"], one["stage"], one["replica"], short_id(one["solver"]), one["toll_micro"], one["bids"],
                len(one["refused"]), "placed" if one["placed"] else "overtaken" if one["overtaken"] else "had it",
            )
            for one in units
        ],
    )  # fmt: skip
    terminal.say(
        f"  made again from the signed bids and {len(placing.reports)} reports of links: the rule finds none that "
        f"costs less than {made.cost_micro} micro-credits, the time of all steps included"
    )
    if unasked:
        terminal.say(f"  {len(unasked)} overtaken: the bid that won changed while the round was played")
    if left_out:
        terminal.say(f"  {left_out} bids that could not have their unit were left out of it for want of room")


def _show(terminal: Terminal, deal: str, made: Audit) -> None:
    ranked: list[dict[str, Any]] = [
        {
            "solver": scored.solver.hex(),
            "score_micro": scored.score_micro,
            "price_micro": scored.price_micro,
            "risk_micro": scored.risk_micro,
            "wait_micro": scored.wait_micro,
            "transfer_micro": scored.transfer_micro,
            "won": scored == made.winner,
        }
        for scored in made.choice.ranked
    ]
    refused = [{"solver": s.hex(), "code": r.code, "why": r.why} for s, r in made.choice.refused]
    terminal.record(
        "ichiba.match/1",
        {
            "deal": deal, "offer": made.offer_id.hex(), "winner": made.winner.solver.hex(), "same": True,
            "explored": made.choice.explored, "offers_in_round": made.offers, "ranked": ranked, "refused": refused,
        },
    )  # fmt: skip
    terminal.table(
        f"match of offer {short_id(made.offer_id.hex())}" + (f", deal {short_id(deal)}" if deal else ""),
        ("solver", ">score", ">price", ">risk", ">wait", ">transfer", ""),
        [
            (
                short_id(one["solver"]),
                one["score_micro"],
                one["price_micro"],
                one["risk_micro"],
                one["wait_micro"],
                one["transfer_micro"],
                "won" if one["won"] else "",
            )
            for one in ranked
        ],
    )
    for one in refused:
        terminal.say(f"  {short_id(one['solver'])} could not win: {one['code']}, {one['why']}")
    if made.choice.explored:
        terminal.say("  a round for newcomers: the best of them went first")
    if made.offers > 1:
        terminal.say(f"  {made.offers} offers of this peer were matched together, each to another solver")
    terminal.say("  made again from the signed bids: the same solver wins")
