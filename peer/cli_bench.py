"""`ichiba bench`: measure this device and make its bench card, and check other peers' cards."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_output import SIZE, Terminal, ago, common, short_id, size_of
from protocol.errors import IchibaError

if TYPE_CHECKING:
    from protocol.bench_card import OpenCard
    from protocol.keys import SigningKey

__all__ = ["bench"]

_FILE = "bench-card"
_STAGES = {
    "warm": "starting, and measuring the device",
    "chain": "multiplying the chain",
    "memory": "filling memory",
    "probe": "having the memory probed",
}


class BenchRefused(IchibaError):
    """The challenger gave no card."""

    code = "bench-refused"


@click.command()
@click.option("--alone", is_flag=True, help="Time it yourself, even if a peer is connected; such a card weighs less.")
@click.option("--with", "challenger", metavar="PEER", help="The connected peer that is to time it; else any.")
@click.option("--memory", type=SIZE, help="How much memory to fill and have probed; else what `ichiba up` offers.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the card file here, for --check.")
@click.option(
    "--check", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Check a card file; makes nothing."
)
@click.option("--challenge", is_flag=True, help="Challenge every connected solver (or --with PEER) at the same moment.")
@click.option("--list", "show_all", is_flag=True, help="Show the cards this peer knows.")
@common
def bench(
    terminal: Terminal,
    alone: bool,
    challenger: str | None,
    memory: int | None,
    out: Path | None,
    check: Path | None,
    challenge: bool,
    show_all: bool,
) -> None:
    """Measure this device and make its bench card, the proof of what it can do.

    A chain of exact matrix products, bound to this peer's key, takes about half a minute; anybody checks it in under a
    hundredth of that. If the daemon has a connected peer, that peer draws the chain, times it on its own clock and
    probes the memory at random; without one the card is self-timed, and others believe it less. It expires after six
    hours.

    \b
    ichiba bench
    ichiba bench --alone --out card.bin
    ichiba bench --check card.bin
    ichiba bench --list
    """
    if sum((check is not None, challenge, show_all)) > 1 or (alone and challenger is not None):
        raise click.UsageError("--check, --challenge and --list exclude each other, and --alone excludes --with")
    if check is not None:
        _check(terminal, check)
    elif challenge:
        with terminal.client() as client:
            invited = client.challenge([challenger] if challenger else [])
        terminal.record("ichiba.bench.challenge/1", {"invited": invited})
        terminal.say(f"{len(invited)} peers are invited; `ichiba bench --list` shows what they prove")
    elif show_all:
        _list(terminal)
    elif alone or not (challenger or _connected(terminal)):
        _alone(terminal, out)
    else:
        _with_peer(terminal, challenger or "", memory, out)


def _connected(terminal: Terminal) -> bool:
    """Whether a daemon runs here that sees somebody who could time us."""
    from peer.client import DaemonNotRunning

    try:
        with terminal.client() as client:
            return bool(client.status()["peers"])
    except DaemonNotRunning:
        return False


# --- making ------------------------------------------------------------------------------------------------
def _alone(terminal: Terminal, out: Path | None) -> None:
    """A self-timed card, made by this command itself."""
    import trio

    from peer.home import Home
    from peer.passphrase import passphrase_for
    from protocol.keys import SigningKey

    home = Home(terminal.data_dir)
    key, network = SigningKey.from_seed(home.seed(passphrase_for(home))), home.network()
    out = out or terminal.data_dir / _FILE
    with terminal.progress() as live:
        bar = live.add_task(_STAGES["warm"], total=None, note="") if live is not None else None

        def moved(done: int, total: int) -> None:
            if live is not None and bar is not None:
                live.update(bar, description=_STAGES["chain"], completed=done, total=total, note=f"{done} of {total}")

        opened, data = trio.run(_make, key, network.id, terminal.data_dir, moved)
    out.write_bytes(data)
    _show(terminal, opened, out)
    terminal.note("timed by this machine alone: with a connected peer `ichiba bench` makes a card that weighs more")


async def _make(
    key: SigningKey, network: bytes, folder: Path, moved: Callable[[int, int], None]
) -> tuple[OpenCard, bytes]:
    """Challenge ourselves, multiply, sign. The card and its file."""
    from peer.bench_process import open_bench
    from protocol import params
    from protocol.bench_card import (
        Figures,
        card_file,
        chain_size,
        evidence_id,
        open_card,
        open_challenge,
    )
    from protocol.records import BenchCard, BenchChallenge, seal
    from worker.bench import Chain, Chained, Measure, Measured

    part = folder / f"{_FILE}-{secrets.token_hex(8)}.part"
    try:
        async with open_bench() as process:
            measured = await process.order(Measure(str(folder), 1), Measured)
            side, links = chain_size(measured.exact_per_second)
            now = time.time_ns()
            challenge = BenchChallenge(
                network=network, challenger=key.public, peer=key.public, nonce=secrets.token_bytes(32),
                side=side, links=links, memory_blocks=0, window_ns=params.BENCH_WINDOW_NS_MAX,  # type: ignore[arg-type]
                created_ns=now, expires_ns=now + params.BENCH_WINDOW_NS_MAX,
            )  # fmt: skip
            sealed = seal(challenge, key)
            challenge_id = open_challenge(sealed, network=network)[1]
            done = await process.order(Chain(challenge_id, side, links, 1, str(part)), Chained, moved)
        evidence = part.read_bytes()
    finally:
        part.unlink(missing_ok=True)
    now = time.time_ns()
    card = BenchCard(
        network=network, peer=key.public, challenger=key.public, challenge=sealed, evidence=evidence_id(evidence),
        elapsed_ns=done.elapsed_ns, memory_root=bytes(32), created_ns=now,
        expires_ns=now + params.BENCH_CARD_LIFETIME_NS,
        **{name: getattr(measured.figures, name) for name in Figures.__struct_fields__},
    )  # fmt: skip
    envelope = seal(card, key)
    return open_card(envelope, network=network, now_ns=now), card_file(envelope, evidence)


def _with_peer(terminal: Terminal, challenger: str, memory: int | None, out: Path | None) -> None:
    """A card that another peer times; the daemon makes it, this command watches. Ctrl-C detaches."""
    import tempfile

    from protocol.bench_card import card_file, open_card

    with terminal.client() as client, terminal.progress() as live:
        past = client.events()
        since = max((event["seq"] for event in past), default=0)
        begun = client.bench(peer=challenger, memory_bytes=memory)
        terminal.note(f"{begun['challenger']} times it; Ctrl-C only stops watching")
        bar = live.add_task("", total=None, note="") if live is not None else None
        for event in client.events(follow=True, since=since):
            if event["kind"] == "bench":
                stage = _STAGES[event["stage"]]
                if live is None or bar is None:
                    terminal.note(stage)
                else:
                    live.update(bar, description=stage)
            elif event["kind"] == "bench-refused":
                raise BenchRefused(
                    f"no card: {event['code']}", why=event["why"], next_step="try again, or `ichiba bench --alone`"
                )
            elif event["kind"] == "bench-card":
                break
        cards = client.cards()
        envelope, evidence = bytes.fromhex(cards["own"]), bytes.fromhex(cards["own_evidence"])
        with tempfile.TemporaryDirectory() as folder:
            client.get_blob(evidence, Path(folder) / "evidence")
            data = card_file(envelope, (Path(folder) / "evidence").read_bytes())
    from peer.home import Home

    network = Home(terminal.data_dir).network()
    out = out or terminal.data_dir / _FILE
    out.write_bytes(data)
    _show(terminal, open_card(envelope, network=network.id, now_ns=time.time_ns()), out)


# --- looking -----------------------------------------------------------------------------------------------
def _check(terminal: Terminal, file: Path) -> None:
    # Before numpy is loaded: a check reads memory, and a second thread only waits for it (measured: 4 times longer).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from peer.home import Home
    from protocol import params
    from protocol.bench_card import check_card_file
    from protocol.errors import LimitExceeded

    network = Home(terminal.data_dir).network()
    if file.stat().st_size > params.BENCH_FILE_BYTES_MAX:
        raise LimitExceeded(f"{file} has {file.stat().st_size} bytes: that is no card file")
    start = time.perf_counter()
    opened = check_card_file(
        file.read_bytes(), network=network.id, now_ns=time.time_ns(), randbytes=secrets.token_bytes
    )
    took = time.perf_counter() - start
    _show(terminal, opened, file, check_seconds=took)


def _show(terminal: Terminal, opened: OpenCard, file: Path, *, check_seconds: float = 0.0) -> None:
    from protocol.bench_card import Figures
    from protocol.keys import peer_name

    card = opened.card
    values: dict[str, Any] = {
        "peer": peer_name(card.peer),
        "card": opened.id.hex(),
        "timed": opened.grade,
        "challenger": peer_name(card.challenger),
        "operations_per_second": opened.operations_per_second,
        "elapsed_ns": card.elapsed_ns,
        "proven_memory_bytes": opened.proven_memory_bytes,
        **{name: getattr(card, name) for name in Figures.__struct_fields__},
        "expires_ns": card.expires_ns,
        "file": str(file),
    }
    if check_seconds:
        values["check_ms"] = round(check_seconds * 1e3, 1)
    terminal.record("ichiba.bench/1", values)
    own = opened.grade == "self-timed"
    proven = "none" if own else size_of(opened.proven_memory_bytes)
    gops, took = opened.operations_per_second / 1e9, card.elapsed_ns / 1e9
    memory, disk = size_of(card.memory_bytes), size_of(card.disk_bytes)
    lines: dict[str, object] = {
        "peer": values["peer"],
        "timed": "by itself" if own else f"by {values['challenger']}",
        "exact products": f"{gops:.1f} giga-operations per second, over {took:.1f} s",
        "float32": f"{card.float32_per_second / 1e9:.1f} giga-operations per second",
        "memory": f"{proven} proven, {memory} in all, {size_of(card.memory_bytes_per_second)}/s",
        "disk": f"{disk} free, {size_of(card.disk_bytes_per_second)}/s",
        "device": f"{card.device}, {card.cores} cores, measured on {card.threads}",
        "card": f"{short_id(values['card'])}, expires in {(card.expires_ns - time.time_ns()) // 60 // 10**9} min",
        "file": file,
    }
    if check_seconds:
        share = 100 * check_seconds * 1e9 / card.elapsed_ns
        lines["check"] = f"right: every product, in {check_seconds * 1e3:.0f} ms ({share:.2f} % of making it)"
    terminal.pairs(lines)


def _list(terminal: Terminal) -> None:
    with terminal.client() as client:
        cards = client.cards()["cards"]
    for card in cards:
        terminal.record("ichiba.bench.card/1", card)
    terminal.table(
        "bench cards",
        ("peer", "timed", ">exact Gop/s", ">proven memory", "device", ">made"),
        [
            (
                card["peer"],
                card["timed"],
                f"{card['operations_per_second'] / 1e9:.1f}",
                size_of(card["proven_memory_bytes"]),
                card["device"],
                ago(card["created_ns"]),
            )
            for card in cards
        ],
    )
