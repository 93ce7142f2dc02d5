"""Commands about the money: wallet, receipts verify."""

from __future__ import annotations

import mmap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import Terminal, common, credits_of, short_id
from protocol.money_line import MoneyLine

if TYPE_CHECKING:
    from protocol.bundle import BundleReport

__all__ = ["check_proof", "read_evidence", "receipts", "show_proof", "trusted_network", "wallet"]


@click.group(invoke_without_command=True)
@click.option("--all", "everybody", is_flag=True, help="Show every peer of the network, and that the sums agree.")
@common
def wallet(terminal: Terminal, everybody: bool) -> None:
    """Show what this peer holds, locks, earns, owes; move its stake, back it up.

    \b
    ichiba wallet
    ichiba wallet stake 5
    ichiba wallet --all
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    with terminal.client() as client:
        found = client.wallet(everybody=everybody)
    terminal.record("ichiba.wallet/1", found)
    terminal.pairs(
        {
            "peer": found["peer"],
            "free": f"{credits_of(found['free_micro'])} credits",
            "stake": f"{credits_of(found['stake_micro'])} credits free to lock",
            "earned": f"{credits_of(found['earned_unsettled_micro'])} credits in vouchers, not settled yet",
        }
        | _leaving(found)
        | ({"money": MoneyLine(**found["money"]).words()} if "money" in found else {})
    )
    terminal.table(
        "deals as solver",
        ("deal", "state", ">vouchers", ">paid"),
        [
            (short_id(deal["deal"]), deal["state"], credits_of(deal["vouchers_micro"]), credits_of(deal["paid_micro"]))
            for deal in found["deals"]
        ],
    )
    if everybody and found["table"]:
        _money_table(terminal, found["table"])


def _leaving(found: dict[str, Any]) -> dict[str, str]:
    """Of a wallet: what unbonds, and the moves that do not stand yet."""
    from peer.cli_stake import frees

    lines = [f"{credits_of(one['amount_micro'])} credits {frees(one['frees_ns'])}" for one in found["unbonding"]]
    told = {"unbonding": "; ".join(lines)} if lines else {}
    words = {"add": "into the stake", "withdraw": "out of it"}
    under_way = [
        f"{credits_of(move['amount_micro'])} credits {words[move['kind']]}: {move['state']} {move['why']}".rstrip()
        for move in found["moves"]
        if move["state"] not in ("done", "void")
    ]
    return told | ({"moving": "; ".join(under_way)} if under_way else {})


_MONEY_COLUMNS = (
    "deposited", "withdrawn", "free", "stake", "unbonding", "channels", "locks", "earned", "awarded", "paid", "slashed",
)  # fmt: skip


def _money_table(terminal: Terminal, table: dict[str, Any]) -> None:
    rows = [*table["rows"], table["totals"]]
    terminal.table(
        "everybody, in credits",
        ("peer", *(f">{name}" for name in _MONEY_COLUMNS)),
        [(row["name"][-12:], *(credits_of(row[f"{name}_micro"]) for name in _MONEY_COLUMNS)) for row in rows],
    )
    terminal.say(f"burned {credits_of(table['burned_micro'])}, in the jackpot pool {credits_of(table['pool_micro'])}")


trusted_network = click.option(
    "--network",
    "network_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The network file you trust; without it that of the data directory.",
)


@click.group()
def receipts() -> None:
    """Check and export the evidence of finished work."""


@receipts.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@trusted_network
@common
def verify(terminal: Terminal, path: Path, network_file: Path | None) -> None:
    """Check the proof in PATH and the weights next to it.

    PATH is a proof.json, or the directory `ichiba job get` wrote. Needs no daemon and asks nobody: it checks every
    signature, the chain of receipts, the draw, the verdicts and the amounts, and that weights.safetensors,
    checkpoint.safetensors and result.safetensors, where they lie beside it, are what the proof ends in.

    \b
    ichiba receipts verify char-gpt-3f2a
    ichiba receipts verify proof.json --network market.toml
    """
    from peer.home import Home

    home = Home(terminal.data_dir)
    network = home.network(network_file)
    proof = path / "proof.json" if path.is_dir() else path
    report, files = check_proof(proof, network.id)
    show_proof(terminal, report, files)


def read_evidence(file: Path) -> Any:
    """What a file of evidence says, as JSON that nothing is known of yet. Raises VerificationFailed."""
    import json

    from protocol import params
    from protocol.errors import VerificationFailed

    if file.stat().st_size > params.BUNDLE_BYTES_MAX:
        raise VerificationFailed(f"{file} has more than {params.BUNDLE_BYTES_MAX} bytes")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(f"{file} is no JSON: {error}"[:300]) from None


def check_proof(proof: Path, network_id: bytes) -> tuple[BundleReport, list[str]]:
    """Check a proof.json and the files next to it: the report, and what was found about the files.

    Raises VerificationFailed, and NotFound if there is no proof.
    """
    import msgspec

    from peer.cli_result import RESULT_PREFIX
    from protocol import params
    from protocol.bundle import verify_bundle, verify_checkpoint, verify_outputs, verify_weights
    from protocol.errors import NotFound, VerificationFailed

    if not proof.is_file():
        raise NotFound(f"no proof.json in {proof.parent}", next_step="ichiba job get JOB")
    if proof.stat().st_size > params.BUNDLE_BYTES_MAX:
        raise VerificationFailed(f"{proof} has more than {params.BUNDLE_BYTES_MAX} bytes")
    try:
        bundle = msgspec.json.decode(proof.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise VerificationFailed(f"{proof} is no JSON: {error}"[:300]) from None
    report = verify_bundle(bundle, network_id)
    files = []
    result = proof.with_name("script.result")
    if report.script and result.exists():
        with _Mapped(result) as data:
            count = verify_outputs(report, data)
        files.append(f"{result.name}: its {count} output(s) are those both parties signed for")
    names = ("checkpoint.safetensors", "weights.safetensors", "result.safetensors")
    checkpoint, weights, results = (proof.with_name(name) for name in names)
    if checkpoint.exists():
        with _Mapped(checkpoint) as data:
            verify_checkpoint(report, data)
        files.append(f"{checkpoint.name} is the state the proof ends in, bit for bit")
    if weights.exists():
        with _Mapped(weights) as data:
            count = verify_weights(report, data)
        files.append(f"{weights.name}: all {count} tensors are those of that state, bit for bit")
    if results.exists():
        with _Mapped(results) as data:
            count = verify_weights(report, data, prefix=RESULT_PREFIX)
        files.append(f"{results.name}: all {count} tensors are results of that state, bit for bit")
    return report, files


class _Mapped:
    """A file's bytes without reading them all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> memoryview | bytes:
        with self.path.open("rb") as file:
            if not self.path.stat().st_size:
                return b""
            # Not closed by hand: numpy's views of it may outlive the block; the last of them unmaps it.
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __exit__(self, *_: object) -> None:
        return None


def show_proof(terminal: Terminal, report: BundleReport, files: list[str]) -> None:
    """What was proved, and what was not."""
    proved, not_proved = [*report.proved(), *files], report.not_proved()
    if not files:
        not_proved.insert(0, "any weights: no weights.safetensors or checkpoint.safetensors lies beside the proof")
    terminal.record(
        "ichiba.proof/1",
        {
            "job": report.job.hex(),
            "name": report.name,
            "network": report.network,
            "task": report.task.hex(),
            "complete": report.complete,
            "final_root": report.final_root.hex(),
            "segments": report.segments,
            "segments_done": report.segments_done,
            "segments_checked": list(report.segments_checked),
            "operations": report.operations,
            "operations_checked": report.operations_checked,
            "paid_micro": report.paid_micro,
            "fees_micro": report.fees_micro,
            "money": asdict(report.money),
            "proved": proved,
            "not_proved": not_proved,
        },
    )
    terminal.say(f"job {short_id(report.job.hex())} ({report.name}) on network {report.network}")
    terminal.say(f"  money       {report.money.words()}")
    for line in proved:
        terminal.say(f"  proved      {line}")
    for line in not_proved:
        terminal.say(f"  not proved  {line}")
