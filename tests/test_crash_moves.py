"""A real process killed at every effect while credits move into its stake and out of it: each move counts once.

As tests/test_crash_node.py, whose processes and points these are; here the mortal peer is the owner of the stake, or
one of the notaries that certify its moves.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from market.entries import Account
from peer.simulator import Faults
from protocol.records import StakeMove, open_record
from tests.dispute_swarm import court
from tests.swarm_scenario import make_swarm
from tests.test_crash_node import Mortal, Nursery, _MortalRun, nursery  # noqa: F401  # a fixture

MOVES_MAX, MICRO, STAKE_MICRO, FREE_MICRO = 40, 1_000_000, 50_000_000, 100_000_000


class _Moving(_MortalRun):
    """Alice moves credits until a move passes with no new death; then every ledger has every move once."""

    def finish(self) -> None:
        simulation, name = self.simulation, self.mortal.name
        simulation.run(seconds=4)
        for number in range(MOVES_MAX):
            while simulation.peers["alice"].node is None or simulation.peers[name].node is None:
                simulation.run(seconds=3)
            before = self.deaths
            verb = ("stake", "unstake")[number % 2 if number < 12 else 0]  # eight withdrawals may be under way
            reply = simulation.command("alice", verb, {"amount_micro": MICRO})
            assert reply.error is None, reply.error
            simulation.run(seconds=30)
            if self.deaths == before and number:
                break
        else:
            raise AssertionError(f"{MOVES_MAX} moves, and each met a new point")
        simulation.run(seconds=360)  # what was given up is certain to stand, or not to
        self.come_to_rest()
        self.count()

    def count(self) -> None:
        simulation = self.simulation
        moves = simulation.command("alice", "wallet", {}).result["moves"]
        done = [move for move in moves if move["state"] == "done"]
        assert {move["state"] for move in moves} <= {"done", "void"}, moves
        added = sum(move["amount_micro"] for move in done if move["kind"] == "add")
        taken = sum(move["amount_micro"] for move in done if move["kind"] == "withdraw")
        assert added and taken
        alice = simulation.peers["alice"].key.public
        for one in simulation.peers.values():
            if one.node is None:
                continue
            logged = [open_record(e, network=simulation.network.id)[0] for e in one.node.settler.log.values()]
            assert len(logged) == len(done) and all(isinstance(move, StakeMove) for move in logged)
            ledger, stakes = one.node.desk.ledger, one.node.settler.stakes
            assert ledger.balance_micro(Account(alice, "stake")) == STAKE_MICRO + added - taken
            assert ledger.balance_micro(Account(alice, "free")) == FREE_MICRO - added
            assert stakes.unbonding_micro(alice) == taken
            assert not one.node.certificates.notary.free and not one.node.certificates.notary.stake


class Owner(Mortal):
    """Of a network with notaries, or of one without."""

    def __init__(self, name: str, root: Path, nursery: Nursery, *, judged: bool) -> None:  # noqa: F811
        super().__init__(name, root, nursery)
        self.judged = judged

    def run(self) -> None:
        self.directory = self.root / "data"
        self.simulation = court(1) if self.judged else make_swarm(1, Faults(until_ns=0))
        self.seed = bytes(self.simulation.peers[self.name].key._key)
        _Moving(self).finish()


@pytest.mark.parametrize(
    ("name", "judged", "kinds"),
    [
        ("alice", False, {"publish StakeMove"}), ("alice", True, {"publish StakeMove", "send CertifyAsk"}),
        ("notary0", True, {"send Certified"}),
    ],
)  # fmt: skip
def test_a_process_killed_at_every_effect_moves_each_credit_once(
    tmp_path: Path, nursery: Nursery, name: str, judged: bool, kinds: set[str]  # noqa: F811
) -> None:
    mortal = Owner(name, tmp_path, nursery, judged=judged)
    mortal.run()
    for when in ("before ", "torn ", "after "):
        assert {point.removeprefix(when) for point in mortal.covered if point.startswith(when)} >= kinds, when
