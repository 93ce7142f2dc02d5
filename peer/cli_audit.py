"""`ichiba audit match`: a match made again from the signed offer and bids, by anybody, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, common, short_id, write_whole
from protocol.errors import IchibaError, NotFound

if TYPE_CHECKING:
    from market.audit import Audit

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
    was connected) is its own word: it is shown, so that you can compare it with what your peer knows.

    \b
    ichiba audit match 3fa2
    ichiba audit match 3fa2 --export match.bin
    ichiba audit match --file match.bin
    """
    from market.audit import check_match, read_match

    if (job is None) == (source is None):
        raise _NothingToAudit(
            "give a JOB of this peer or a --file that was exported", next_step="ichiba audit match --help"
        )
    if source is not None:
        found = [{"deal": "", "match": source.read_bytes().hex()}]
    else:
        with terminal.client() as client:
            found = client.matches(str(job))["matches"]
        if not found:
            raise NotFound("no match of this job is kept here", next_step="ichiba why JOB")
    for one in found:
        _show(terminal, one["deal"], check_match(read_match(bytes.fromhex(one["match"]))))
    if export is not None:
        write_whole(export, bytes.fromhex(found[-1]["match"]))
        terminal.note(f"the last match is in {export}; anybody can check it with `ichiba audit match --file {export}`")


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
