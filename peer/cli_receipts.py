"""The `receipts` group: verify evidence offline, and export co-signed receipts for other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from peer.cli_money import receipts
from peer.cli_output import Terminal, common, write_whole

if TYPE_CHECKING:
    from protocol.network import Network
    from protocol.records import Agreement

__all__ = ["receipts"]

COLUMNS: Final = (
    "job", "deal", "submitter", "solver", "sequence", "segment", "operations", "amount_micro", "cumulative_micro",
    "done_ns", "in_root", "out_root", "losses_root", "checkpoint", "previous", "receipt", "envelope",
)  # fmt: skip


@receipts.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB]...")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Of every job, instead of those named.")
@click.option("--format", "form", type=click.Choice(("json", "csv")), default="json", help="Of FILE; json by default.")
@common
def export(terminal: Terminal, job_ids: tuple[str, ...], file: Path, everything: bool, form: str) -> None:
    """Write the co-signed receipts of jobs to FILE, with the signed bytes of each and the money line of each job.

    JSON holds the whole evidence of each job too, in the form that `ichiba receipts verify` takes apart; CSV has one
    line for a receipt. Signatures are checked before anything is written.

    \b
    ichiba receipts export 3f2a receipts.json
    ichiba receipts export --all --format csv receipts.csv
    """
    from peer.home import Home
    from protocol.bundle import make_bundle

    if everything == bool(job_ids):
        raise click.UsageError("name jobs, or say --all")
    home = Home(terminal.data_dir)
    network = home.network()
    told, rows = [], []
    with terminal.client() as client:
        wanted = [one["job"] for one in client.jobs()] if everything else [word.lower() for word in job_ids]
        for job_id in wanted:
            evidence = client.bundle(job_id)
            found = [row for deal in evidence["deals"] for row in _rows(evidence["job"], deal, network)]
            rows += found
            bundle = make_bundle(evidence, network=home.network_file.read_text(), state={})
            told.append(
                {"job": evidence["job"], "name": evidence["name"], "money": evidence["money"], "receipts": found}
                | {"proof": bundle}
            )
    text = _csv(rows) if form == "csv" else json.dumps({"schema": "ichiba.receipts/1", "jobs": told}, indent=1) + "\n"
    write_whole(file, text.encode())
    terminal.record("ichiba.receipts-export/1", {"file": str(file), "jobs": len(told), "receipts": len(rows)})
    terminal.say(f"{file}: {len(rows)} receipts of {len(told)} jobs")


def _rows(job: str, deal: dict[str, Any], network: Network) -> list[dict[str, Any]]:
    """The receipts of one deal of a bundle, opened. Raises VerificationFailed, MalformedRecord."""
    from protocol.errors import VerificationFailed
    from protocol.keys import peer_name
    from protocol.records import Agreement, Receipt, open_record

    agreement, agreement_id, _ = open_record(bytes.fromhex(deal["agreement"]), network=network.id)
    assert isinstance(agreement, Agreement), "the daemon's own agreement"
    rows, sum_micro = [], 0
    for text in deal["receipts"]:
        receipt, receipt_id, signers = open_record(bytes.fromhex(text), network=network.id)
        if not isinstance(receipt, Receipt) or signers != _parties(agreement) or receipt.agreement != agreement_id:
            raise VerificationFailed(f"a receipt of deal {agreement_id.hex()[:12]} without both signatures")
        sum_micro += receipt.amount_micro
        rows.append(
            {
                "job": job,
                "deal": agreement_id.hex(),
                "submitter": peer_name(agreement.submitter),
                "solver": peer_name(agreement.solver),
                "cumulative_micro": sum_micro,
                "receipt": receipt_id.hex(),
                "envelope": text,
                **{name: getattr(receipt, name) for name in ("sequence", "segment", "operations", "amount_micro")},
                "done_ns": receipt.done_ns,
                **{
                    name: getattr(receipt, name).hex()
                    for name in ("in_root", "out_root", "losses_root", "checkpoint", "previous")
                },
            }
        )
    return [{name: row[name] for name in COLUMNS} for row in rows]


def _parties(agreement: Agreement) -> frozenset[bytes]:
    return frozenset((agreement.submitter, agreement.solver))


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
