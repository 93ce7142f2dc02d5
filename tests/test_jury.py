"""The jury of work that has no game: nobody chooses it, nobody votes twice, silence only brings the next juror."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from peer.jury import Jury
from peer.messages import CheckRequest, JuryAsk
from protocol import params
from protocol.codec import blake
from protocol.jury import Word, bound_root, cause_of, jury_of
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.profile import Tolerance
from protocol.records import Verdict

QUORUM = 3
RULES = Rules(tolerant_quorum=QUORUM, dispute_replay_ms=60_000)
STAKE = RULES.checker_stake_min_micro
RANDOM = blake("test/random")
KEYS = {name: SigningKey.from_seed(blake("test/jury", name.encode())).public for name in (
    "alice", "bob", "victor", "notary0", "notary1", "notary2", "notary3", *(f"juror{n}" for n in range(12)), "poor",
)}  # fmt: skip
PARTIES = frozenset(KEYS[name] for name in ("alice", "bob", "victor"))
SECOND = 10**9
PPB = 1000
TOLERANCE = Tolerance(PPB, PPB, ())
ROOT = (bytes(32), bytes(32), -1)
CLAIMED, FOUND, OTHER = (blake("test/root", name) for name in (b"claimed", b"found", b"other"))


def network_of(**stakes: int) -> Network:
    deposits = tuple(
        Deposit(peer_name(key), 0, stakes.get(name, STAKE - 1 if name == "poor" else STAKE))
        for name, key in KEYS.items()
    )
    return Network("jury", RULES, deposits, (), tuple(peer_name(KEYS[f"notary{n}"]) for n in range(4)))


# --- who -----------------------------------------------------------------------------------------------------
def test_neither_parties_nor_notaries_nor_the_unstaked_sit_on_it() -> None:
    seen: set[bytes] = set()
    for segment in range(40):
        jury = jury_of(RANDOM, segment, network_of(), parties=PARTIES)
        assert len(set(jury)) == len(jury) == 2 * QUORUM + 1
        seen |= set(jury)
    assert seen == {KEYS[f"juror{n}"] for n in range(12)}


def test_the_deals_own_randomness_and_the_segment_decide_and_nobodys_list() -> None:
    network = network_of()
    shuffled = msgspec.structs.replace(network, deposits=tuple(reversed(network.deposits)))
    jury = jury_of(RANDOM, 3, network, parties=PARTIES)
    assert jury == jury_of(RANDOM, 3, shuffled, parties=PARTIES)
    assert jury != jury_of(RANDOM, 4, network, parties=PARTIES)
    assert jury != jury_of(blake("other"), 3, network, parties=PARTIES)
    first = sum(
        jury_of(RANDOM, s, network_of(juror0=11 * STAKE), parties=PARTIES)[0] == KEYS["juror0"] for s in range(200)
    )
    assert 70 < first < 130, "a stake of half of all is asked first in half of the cases"


def challenge_by(name: str, root: bytes = FOUND, *, segment: int = 2, copied: str = "") -> Any:
    """A challenge by who found `root`; copied: by whom it was stated."""
    stated = bound_root(KEYS[copied or name], root)
    return SimpleNamespace(
        challenger=KEYS[name], segment=segment, agreement=bytes(32), proof=bytes(32), claimed_root=CLAIMED,
        found_root=stated,
    )  # fmt: skip


# --- what they say -------------------------------------------------------------------------------------------
class Bench:
    """A jury before one notary, the clock in hand, and what it sent and ruled. Its work is float, or exact."""

    def __init__(self, *, exact: bool = False) -> None:
        self.sent: list[tuple[bytes, JuryAsk]] = []
        self.ruled: list[str] = []
        self.causes: list[str] = []
        self.on: list[bytes] = []  # the disputes it ruled on
        self.desk: Any = SimpleNamespace(
            now_ns=SECOND, network=network_of(), emit=lambda *_, **__: None,
            send=lambda peer, message: self.sent.append((peer, message)),
        )  # fmt: skip
        self.exact = exact
        challenge = challenge_by("victor")
        request = CheckRequest(
            agreement=b"a", task=b"t", base_blob=b"", receipts=(b"r",), proof=b"p", reveals=(b"s",), segments=(1, 2),
            role="verifier", doubt=b"d",
        )  # fmt: skip
        case = SimpleNamespace(random=RANDOM, request=request, tolerance=None if exact else TOLERANCE)
        self.file: Any = SimpleNamespace(
            challenge=challenge, case=case, parties=PARTIES, over=False, id=bytes(32), root=ROOT, age=(5, bytes(32)),
            kept=SimpleNamespace(challenge=b"challenge"),
            jurors=lambda network: jury_of(RANDOM, 2, network, parties=PARTIES),
        )  # fmt: skip
        self.hearing: Any = SimpleNamespace(file=self.file, opened_ns=1)
        self.jury = Jury(self.desk, self.hearing, self._rule)

    def found_wrong_too(self, *, age: int, over: bool = False, root: Any = None) -> None:
        """Another hearing, on which this notary ruled wrong."""
        self.found_too(age=age, over=over, root=root)
        self.jury.ruled = lambda dispute: "wrong" if dispute == OTHER else ""

    def found_too(self, *, age: int, challenge: Any = None, over: bool = False, root: Any = None) -> None:
        """Another hearing."""
        said = challenge or challenge_by("alice", OTHER)
        file = SimpleNamespace(id=OTHER, over=over, root=root or ROOT, age=(age, OTHER), challenge=said)
        other: Any = SimpleNamespace(file=file, opened_ns=0)
        self.jury.hearings = {OTHER: other, bytes(32): self.hearing}

    def _rule(self, hearing: Any, word: Word) -> None:
        self.ruled.append(word.finding)
        self.on.append(hearing.file.id)
        self.causes.append(cause_of(word, hearing.file.challenge))
        hearing.file.over = self.file.over = True

    def tick(self, seconds: int) -> list[bytes]:
        """Time goes on; whom it asked."""
        self.desk.now_ns += seconds * SECOND
        before = len(self.sent)
        self.jury.tick()
        return [peer for peer, _ in self.sent[before:]]

    def says(self, juror: bytes, word: str, **fields: Any) -> None:
        verdict = Verdict(
            network=self.desk.network.id, agreement=bytes(32), proof=bytes(32), checker=juror, role="juror",
            segments=(2,), finding=word, wrong_segment=2, claimed_root=CLAIMED, found_root=FOUND, operations=1,
            done_ns=1, l1_ppb=3 * PPB if word == "wrong" and not self.exact else 0,
        )  # type: ignore[arg-type]  # fmt: skip
        self.jury.on_verdict(msgspec.structs.replace(verdict, **fields))


def test_as_many_are_asked_as_are_missing_and_the_silent_are_replaced() -> None:
    bench = Bench()
    order = bench.jury.jurors
    assert bench.tick(0) == sorted(order[:3])
    assert all(ask.case.segments == (2,) and ask.case.doubt == b"" for _, ask in bench.sent)
    assert bench.tick(0) == [], "not before it is time to say it again"
    bench.says(order[0], "right")
    assert bench.tick(10) == sorted(order[1:3])
    bench.says(order[1], "wrong")
    assert bench.tick(5) == sorted(order[2:4]), "they differ, so a fourth is needed"
    assert set(bench.tick(40)) == set(order[2:6]), "two are silent: asked again, and two more"
    for juror in order[2:4]:
        bench.says(juror, "right")
    assert bench.ruled == ["right"], "who comes late counts"


@pytest.mark.parametrize("finding", ["right", "wrong"])
def test_a_quorum_of_one_word_rules_once(finding: str) -> None:
    bench = Bench()
    for juror in bench.jury.jurors[: QUORUM - 1] * 2:
        bench.says(juror, finding)
    assert bench.ruled == [], "nobody counts twice"
    for juror in bench.jury.jurors[QUORUM - 1 : QUORUM + 2]:
        bench.says(juror, finding)
    assert bench.ruled == [finding]


def test_who_signs_two_words_has_none() -> None:
    bench = Bench()
    order = bench.jury.jurors
    for finding in ("wrong", "right"):
        bench.says(order[0], finding)
    for juror in order[1:3]:
        bench.says(juror, "wrong")
    assert bench.ruled == []
    bench.says(order[3], "wrong")
    assert bench.ruled == ["wrong"]


def test_no_other_word_counts() -> None:
    bench = Bench()
    order = bench.jury.jurors
    for juror in order[:2]:
        bench.says(juror, "wrong")
    outsider = next(KEYS[f"juror{n}"] for n in range(12) if KEYS[f"juror{n}"] not in order)
    bench.says(outsider, "wrong")
    bench.says(KEYS["victor"], "wrong")
    for fields in ({"role": "verifier"}, {"segments": (1,)}, {"segments": (1, 2)}, {"proof": b"p" * 32},
                   {"agreement": b"a" * 32}, {"finding": "unsure"}, {"wrong_segment": 1}, {"claimed_root": OTHER},
                   {"found_root": CLAIMED}, {"l1_ppb": PPB}, {"finding": "right"}):  # fmt: skip
        bench.says(order[2], "wrong", **fields)
    assert bench.ruled == []
    bench.says(order[2], "wrong")
    assert bench.ruled == ["wrong"]


# --- exact work ----------------------------------------------------------------------------------------------
def test_of_exact_work_only_equal_roots_count_together() -> None:
    bench = Bench(exact=True)
    order = bench.jury.jurors
    for juror, root in zip(order, (FOUND, OTHER, FOUND, OTHER), strict=False):
        bench.says(juror, "wrong", found_root=root)
    bench.says(order[4], "right")
    assert bench.ruled == [], "four say wrong, and no three the same"
    bench.says(order[5], "wrong")
    assert (bench.ruled, bench.causes) == (["wrong"], ["jury"])


def test_two_roots_are_two_words() -> None:
    bench = Bench(exact=True)
    order = bench.jury.jurors
    for root in (FOUND, OTHER):
        bench.says(order[0], "wrong", found_root=root)
    for juror in order[1:3]:
        bench.says(juror, "wrong")
    assert bench.ruled == []
    bench.says(order[3], "wrong")
    assert bench.ruled == ["wrong"]


def test_of_a_juror_that_signs_many_words_two_are_kept() -> None:
    bench = Bench(exact=True)
    order = bench.jury.jurors
    for number in range(100):
        bench.says(order[0], "wrong", found_root=blake("test/root", bytes([number])))
    assert len(bench.jury.words[order[0]]) == 2, "they are none already"
    for juror in order[1:4]:
        bench.says(juror, "wrong")
    assert bench.ruled == ["wrong"]


def test_who_accuses_without_having_computed_it_was_wrong_as_well() -> None:
    bench = Bench(exact=True)
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, "wrong", found_root=OTHER)
    assert (bench.ruled, bench.causes) == (["wrong"], ["both"])
    floats = Bench()
    for juror in floats.jury.jurors[:QUORUM]:
        floats.says(juror, "wrong", found_root=OTHER)
    assert (floats.ruled, floats.causes) == (["wrong"], ["jury"]), "float work has another root on each machine"


def test_what_was_received_not_being_what_is_asked_for_is_one_word_of_all() -> None:
    bench = Bench(exact=True)
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, "wrong", found_root=bytes(32))
    assert bench.ruled == ["wrong"]


def test_of_exact_work_nobody_measures_a_distance() -> None:
    bench = Bench(exact=True)
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, "wrong", l2_ppb=1)
    assert bench.ruled == []


def test_a_root_that_another_stated_is_of_no_use() -> None:
    bench = Bench(exact=True)
    bench.file.challenge = challenge_by("alice", copied="victor")
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, "wrong")
    assert (bench.ruled, bench.causes) == (["wrong"], ["both"])


@pytest.mark.parametrize(("age", "challenge", "finder"), [
    (6, challenge_by("alice"), OTHER), (4, challenge_by("alice"), OTHER),
    (6, challenge_by("alice", segment=1), bytes(32)), (6, challenge_by("alice", OTHER), bytes(32)),
])  # fmt: skip
def test_who_did_not_compute_it_keeps_nobody_from_the_finders_share(age: int, challenge: Any, finder: bytes) -> None:
    bench = Bench(exact=True)
    bench.file.challenge = challenge_by("bob", copied="victor")
    bench.found_too(age=age, challenge=challenge)
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, "wrong")
    assert (bench.ruled, bench.on) == (["wrong"], [finder])
    assert bench.causes == ["jury" if finder == OTHER else "both"]
    assert bench.jury.hearings[finder].opened_ns, "so that its ruling is told again"


# --- two challenges ------------------------------------------------------------------------------------------
def heard(bench: Bench, word: str) -> list[str]:
    """A quorum says it; what is ruled at once."""
    for juror in bench.jury.jurors[:QUORUM]:
        bench.says(juror, word)
    return list(bench.ruled)


@pytest.mark.parametrize(("age", "graces"), [(6, 1), (4, params.JURY_YOUNGER_WAITS)])
def test_of_two_right_challenges_the_older_has_time_to_come_to_a_quorum(age: int, graces: int) -> None:
    bench = Bench(exact=True)
    bench.found_wrong_too(age=age)
    assert heard(bench, "wrong") == []
    wait = graces * params.DISPUTE_GRACE_NS // SECOND
    bench.tick(wait - 1)
    assert bench.ruled == [], "the other may still have its quorum"
    bench.tick(1)
    assert bench.ruled == ["wrong"], "it did not come to one: no cheat goes free by that"


def test_nothing_waits_for_a_challenge_of_other_work_or_one_that_is_over() -> None:
    for fields in ({"over": True}, {"root": (bytes(32), OTHER, -1)}):
        bench = Bench(exact=True)
        bench.found_wrong_too(age=4, **fields)
        assert heard(bench, "wrong") == ["wrong"]


def test_that_work_is_right_waits_for_nothing() -> None:
    bench = Bench(exact=True)
    bench.found_wrong_too(age=4)
    assert heard(bench, "right") == ["right"]


def test_a_jury_rules_when_its_hearing_has_its_turn() -> None:
    bench = Bench()
    bench.hearing.opened_ns = 0
    assert heard(bench, "wrong") == []
    bench.hearing.opened_ns = 1
    bench.tick(0)
    assert bench.ruled == ["wrong"]
