"""Nobody can say of a unit after others what it did not compute: neither who accuses it nor who judges it."""

from __future__ import annotations

from typing import Any

import msgspec

from market.entries import Account
from peer.case import open_evidence
from peer.simulated_faults import SECOND
from protocol.arbitration import Judged
from protocol.records import Challenge, Verdict
from tests.adversaries.stage import Stage, Strategy
from tests.adversaries.strategies import Cheat
from tests.dispute_swarm import states_of, told
from tests.run_scene import run_until, submit_run, until_over
from tests.test_run_disputes import NOTARIES, court, of, over, stake


def arbitrations(stage: Stage, notary: str = "notary0") -> list[Judged]:
    """What notaries found, as the log of one has it."""
    log = stage.node(notary).settler
    return [one for channel in log.channels.values() for one in channel.findings.values()]


class Copier(Strategy):
    """A peer with a stake that says after an accuser what it did not compute, and dates it earlier."""

    def __init__(self) -> None:
        self.heard: dict[bytes, Challenge] = {}

    def plug(self, node: Any, stage: Stage) -> None:
        challenged, seal_it, me = node.disputes.challenged, node.desk.seal, node.desk.me

        def sealed(record: Any) -> bytes:
            if isinstance(record, Challenge) and record.agreement in self.heard:
                first = self.heard[record.agreement]
                record = msgspec.structs.replace(first, challenger=me, created_ns=first.created_ns - SECOND)
            envelope: bytes = seal_it(record)
            return envelope

        def heard(challenge: Challenge, dispute: bytes, envelope: bytes) -> None:
            challenged(challenge, dispute, envelope)
            if challenge.challenger == me or challenge.agreement in self.heard:
                return
            self.heard[challenge.agreement] = challenge
            accuser = stage.by_key[challenge.challenger].node
            assert accuser is not None, "it just said so"
            request = accuser.disputes.disputant.plays[dispute].file.case.request  # as whistleblowers may get it
            case = open_evidence(msgspec.structs.replace(request, segments=(challenge.segment,)), network=stage.network)
            node.disputes.disputant.challenge(case, challenge.found_root)

        node.disputes.challenged, node.desk.seal = heard, sealed


def test_who_says_after_the_accuser_gets_nothing_and_takes_nothing_from_it() -> None:
    copier = Copier()
    stage = court(11, {"s1": Cheat("skip-step"), "s5": copier})
    job = submit_run(stage)["job"]
    run_until(stage, lambda: "wrong" in states_of(stage), seconds=300)
    (judged,) = arbitrations(stage)
    assert copier.heard and judged.challenge.challenger != stage.public("s5") and judged.basis == "repeated"
    disputes = {data["dispute"]: data["challenger"] for _, data in told(stage, "dispute") if "challenger" in data}
    assert stage.public("s5") in disputes.values(), "it was heard, and it was older"
    free = stage.node("notary0").desk.ledger.balance_micro(Account(stage.public("s5"), "free"))
    found = until_over(stage, job, seconds=1500)
    stage.check_quiet()
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"], found
    assert free == 0 and stake(stage, "s5") == 0
    finder = Account(judged.challenge.challenger, "free")
    assert stage.node("notary0").desk.ledger.balance_micro(finder) > 0


def test_nobody_but_notaries_hears_a_juror_before_it_is_over() -> None:
    heard: list[bool] = []  # of each word whether it was over

    class Listener(Strategy):
        def plug(self, node: Any, stage: Stage) -> None:
            on_verdict = node.disputes.on_verdict

            def listen(verdict: Verdict, envelope: bytes) -> None:
                if verdict.role == "juror":
                    heard.append(any(arbitrations(stage, f"notary{number}") for number in range(NOTARIES)))
                on_verdict(verdict, envelope)

            node.disputes.on_verdict = listen

    names = ("alice", *(f"s{n}" for n in range(6)), "victor", "vera", "wendy")
    cast = {name: Listener() for name in names if name != "s1"} | {"s1": Cheat("skip-step")}
    stage = court(12, cast)
    over(stage)
    assert heard and all(heard), "the submitter gets the words, for what it exports"
