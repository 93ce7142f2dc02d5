"""One dispute among real peers, and the referee's leaf: a part of benchmarks/verification.py.

The demonstration runs with a solver that leaves steps out: nine processes, four of them notaries, the model of a
million parameters. Time is from when a notary heard the challenge to when the log had its Arbitration; bytes are those
of both players' signed moves, and of what was opened. That fraud ends at an element-wise operation, so the deepest
descent, to a block of a product, is played beside it in this process (benchmarks/dispute.py).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from demo import SilentScreen
from dispute import demonstration
from verification_overhead import Part

from peer.demo import Plan, run_demo

__all__ = ["add_options", "measure"]

BLOCK = 512  # what a quorum of notaries repeats: the default of the rule `dispute_block`


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--cheat", default="skip-step", help="the fraud that is disputed")


def measure(options: argparse.Namespace) -> Part:
    """Play both disputes. Raises SystemExit if the demonstration fails."""
    outcome = run_demo(Plan(cheat=options.cheat, steps=100), SilentScreen())
    if outcome.failures:
        raise SystemExit("; ".join(outcome.failures))
    found, deepest = outcome.dispute, demonstration()[BLOCK]
    return Part(
        headline={
            "dispute_seconds": found["seconds"],
            "dispute_message_bytes": max(found["message_bytes"], deepest.move_bytes),
            "leaf_opened_bytes": max(found["opening_bytes"], deepest.opened_bytes),
            "leaf_ms": round(deepest.leaf_ms, 2),
        },
        details={"dispute": {"cheat": options.cheat, **found}, "deepest": asdict(deepest)},
        lines=[
            f"dispute of {options.cheat} between real peers: {found['seconds']:.1f} s, {found['rounds']} rounds, "
            f"{found['message_bytes']} bytes of signed moves, {found['opening_bytes']} opened, ends at "
            f"{found['level']}",
            f"deepest descent of the same model, in one process: {deepest.rounds} rounds, {deepest.move_bytes} bytes, "
            f"{deepest.opened_bytes} opened, leaf {deepest.leaf_ms:.2f} ms",
        ],
    )
