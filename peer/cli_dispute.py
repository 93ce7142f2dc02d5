"""The `dispute` group: list disputes about work, and draw how far down one was decided."""

from __future__ import annotations

import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from peer.cli_money import read_evidence, trusted_network
from peer.cli_output import Terminal, ago, common, short_id, size_of, write_whole
from protocol.keys import peer_name

__all__ = ["dispute"]

_ENDS = {
    "wrong": "the work was wrong",
    "right": "the work was right",
    "forced": "the error was ordered, and its finder gets the jackpot",
    "lapsed": "the notaries did not come to a quorum in time",
}
_CAUSES = {
    "leaf": "by the referee's own result at the leaf",
    "jury": "by the words of its jurors",
    "both": "though its challenger was wrong as well",
    "silence": "by silence: its clock ran out",
    "withheld": "by withholding data",
    "malformed": "by an answer that contradicts its own",
    "equivocation": "by signing two answers to one question",
}


@click.group()
def dispute() -> None:
    """List disputes about work, draw how one was decided, check it offline.

    A checker that finds work wrong challenges it. Solver and challenger then answer the same questions, and the
    notaries follow the first difference of their answers down to one operation, which they repeat themselves. Of
    tolerant work, and of a unit of a parallel job, jurors execute the segment again instead.
    """


@dispute.command("list")
@common
def list_(terminal: Terminal) -> None:
    """List the disputes this peer judges, plays in or watches, the newest first.

    \b
    ichiba dispute list
    ichiba dispute list --json
    """
    with terminal.client() as client:
        found = client.disputes()
    for one in found:
        terminal.record("ichiba.dispute/1", one)
    terminal.table(
        "disputes",
        ("dispute", "deal", ">segment", "solver", "challenger", "here as", "state", "level", ">rounds", "opened"),
        [
            (
                short_id(one["dispute"]),
                short_id(one["deal"]),
                one["segment"],
                one["solver"][-8:],
                one["challenger"][-8:],
                one["part"],
                one["state"],
                one["level"],
                one["rounds"],
                ago(one["opened_ns"]),
            )
            for one in found
        ],
    )


@dispute.command()
@click.argument("dispute_id", metavar="DISPUTE")
@common
def show(terminal: Terminal, dispute_id: str) -> None:
    """Draw the descent of a dispute: step, node with its line, tile, element, and the values of all three.

    DISPUTE is its id or any unambiguous beginning of it. Values of elements are drawn as float32.

    \b
    ichiba dispute show 9a138167
    ichiba dispute show 9a138167 --json
    """
    with terminal.client() as client:
        found = client.dispute(dispute_id)
    terminal.record("ichiba.dispute.story/1", found)
    terminal.pairs(
        {
            "dispute": found["dispute"],
            "deal": f"{short_id(found['deal'])}, segment {found['segment']}",
            "solver": f"{found['solver']} stands by {short_id(found['claimed_root'])}",
            "challenger": f"{found['challenger']} {_found(found)}",
            "here as": found["part"],
            "state": _ENDS.get(found["state"], found["state"]),
            "game": _game(found),
        }
    )
    for depth, rung in enumerate(found.get("descent", [])):
        _draw(terminal, depth, rung)
    result = found.get("result")
    if result:
        terminal.say(f"the {result['loser']} loses {_CAUSES[result['cause']]}")
        if result["what"]:
            terminal.say(f"  {result['what']}")
    for one in found.get("jurors", []):
        terminal.say(f"juror {one['juror'][-8:]} finds it {one['finding']}{_measure(one)}")
    for ruling in found["rulings"]:
        terminal.say(f"notary {ruling['notary'][-8:]} rules {ruling['finding']} ({ruling['level']}, {ruling['cause']})")


@dispute.command()
@click.argument("dispute_id", metavar="DISPUTE")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@common
def export(terminal: Terminal, dispute_id: str, file: Path) -> None:
    """Write all evidence of a dispute to FILE, for anybody to check without asking anybody.

    \b
    ichiba dispute export 9a138167 dispute.json
    """
    import json
    import tempfile

    from peer.dispute_bundle import SCHEMA, verify
    from peer.home import Home

    home = Home(terminal.data_dir)
    with terminal.client() as client, tempfile.TemporaryDirectory() as folder:
        bundle = {"schema": SCHEMA, "network": home.network_file.read_text(), **client.dispute_bundle(dispute_id)}
        if bundle["program"]:  # a dispute that jurors decided has none
            graph = Path(folder) / "program"
            client.get_blob(bytes.fromhex(bundle["program"]), graph)
            bundle["program"] = graph.read_bytes().hex()
    report = verify(bundle, home.network().id)
    write_whole(file, json.dumps(bundle, indent=1).encode() + b"\n")
    terminal.record("ichiba.dispute-export/1", {"file": str(file), "dispute": report.dispute.hex()})
    terminal.say(f"wrote {file}; check it with: ichiba dispute verify {file}")


@dispute.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@trusted_network
@common
def verify(terminal: Terminal, file: Path, network_file: Path | None) -> None:
    """Check a dispute that `ichiba dispute export` wrote: signatures, every move, and the last operation again; or that
    its jurors were those who were drawn, and a quorum of them of one word.

    Needs no daemon and asks nobody.

    \b
    ichiba dispute verify dispute.json
    ichiba dispute verify dispute.json --network market.toml
    """
    from peer.dispute_bundle import verify
    from peer.home import Home

    report = verify(read_evidence(file), Home(terminal.data_dir).network(network_file).id)
    told = asdict(report) | {
        "dispute": report.dispute.hex(), "jurors": [peer_name(one) for one in report.jurors],
        "two_words": [peer_name(one) for one in report.two_words],
    }  # fmt: skip
    terminal.record("ichiba.dispute-report/1", told)
    how = f"{len(report.jurors)} jurors" if report.jurors else f"{report.rounds} rounds"
    terminal.say(f"dispute {short_id(told['dispute'])} of segment {report.segment}, {how}")
    terminal.say(f"  the {report.loser} loses {_CAUSES.get(report.cause, report.cause)}, at level {report.level}")
    if report.what:
        terminal.say(f"  {report.what}")
    for juror in told["two_words"]:
        terminal.say(f"  juror {juror[-8:]} signed two words that differ; that is proved here")
    if report.by_word and report.jurors:
        terminal.say("  which of their words came first is the notaries' word: no file can show it")
    elif report.by_word:
        terminal.say("  that a player did not answer is the notaries' word: no file can show it")
    said = f"a quorum of notaries says: {_ENDS[report.finding]}" if report.finding else "no ruling of notaries is in it"
    terminal.say(f"  {said}")


def _found(found: dict[str, Any]) -> str:
    """What a challenger says it found; of a unit it says so in a way that no other peer can say after it."""
    said = short_id(found["found_root"])
    return f"found another end, bound to its key as {said}" if found["root_bound"] else f"found {said}"


def _measure(word: dict[str, Any]) -> str:
    """What a juror goes by: of float work the distance, of exact work the root that it found."""
    if word["l1_ppb"] or word["l2_ppb"]:
        return f": {word['l1_ppb'] / 1e9:.1e} (L2 {word['l2_ppb'] / 1e9:.1e}) of an update from its own end"
    if not word["found_root"]:
        return ""
    if not int(word["found_root"], 16):
        return ": what was received is not what the segment asks for"
    return f": it ends at {short_id(word['found_root'])}"


def _game(found: dict[str, Any]) -> str:
    """How long the game was, in words."""
    if found.get("jury"):
        return "none: jurors execute the segment again"
    if "rounds" not in found or "message_bytes" not in found:
        return "not begun here"
    moves = f"{found['rounds']} rounds, {size_of(found['message_bytes'])} of moves"
    return f"{moves}, {size_of(found['opening_bytes'])} opened" if found["opening_bytes"] else moves


def _draw(terminal: Terminal, depth: int, rung: dict[str, Any]) -> None:
    """One level of the descent, indented below the one before."""
    indent = "  " * depth
    node = f"  {rung['op']}" if rung["op"] else ""
    source = f"  {rung['source']}" if rung["source"] else ""
    terminal.say(f"{indent}{rung['level']}: {rung['where']}{node}{source}")
    for who in ("solver", "challenger", "referee"):
        if rung[who] is not None:
            terminal.say(f"{indent}    {who.ljust(10)}  {_value(rung[who], rung['level'])}")


def _value(value: Any, level: str) -> str:
    """A root by its beginning, a partial result as it is, the bits of an element with the float32 they are."""
    if isinstance(value, str):
        return short_id(value)
    if isinstance(value, list):
        return "(" + ", ".join(map(str, value)) + ")"
    if level in ("element", "block") and isinstance(value, int) and 0 <= value < 2**32:
        return f"0x{value:08x}  {struct.unpack('<f', struct.pack('<I', value))[0]!r}"
    return str(value)
