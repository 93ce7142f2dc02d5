"""What each verb of the control socket takes: a struct a verb, every field typed and bounded before the node sees it.

docs/control.md lists them; peer/commands.py says what they mean.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from protocol import params
from protocol.run_sizes import RunSizes

__all__ = ["VERBS", "PlanRun", "Submit", "SubmitRun"]

_Hex = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{2})*$")]
_Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,64}$")]
_Amount = Annotated[int, msgspec.Meta(ge=1, le=params.AMOUNT_MICRO_MAX)]
_Price = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Level = Annotated[int, msgspec.Meta(ge=0, le=4)]


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """Of status, jobs, cards and disputes."""


class _OneJob(msgspec.Struct, forbid_unknown_fields=True):
    """Of job, cancel, bundle and matches: any unambiguous beginning of its id."""

    job: _Id


class _OnePeer(msgspec.Struct, forbid_unknown_fields=True):
    """Of reputation-bundle: whose; without a name this peer's own. Of credit-revoke, credit-net (without: of all)."""

    peer: Annotated[str, msgspec.Meta(max_length=128)] = ""


class _Reputation(_OnePeer, forbid_unknown_fields=True):
    """Of reputation: of whom (all, without a name) and in which role (all)."""

    role: Literal["", "solver", "verifier", "submitter"] = ""


class _OneDispute(msgspec.Struct, forbid_unknown_fields=True):
    """Of dispute: any unambiguous beginning of its id."""

    dispute: _Id


class Submit(msgspec.Struct, forbid_unknown_fields=True):
    """Of submit: the encoded TaskSpec, its first state root, money in micro-credits, sizes in bytes.

    group: of the replicas of one script. sealed: the offer shows terms only, the winner alone gets the keys to the
    rest. deadline_ns: when the work must be done; 0: whenever. credit: it is done by who gives this peer a credit
    line, unchecked, and owed to it.
    """

    task: Annotated[_Hex, msgspec.Meta(max_length=2 * params.MESSAGE_BYTES_MAX)]
    budget_micro: _Amount
    unit_price_max: _Price
    base_root: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.BLOB_BYTES_MAX)]
    memory_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.PROGRAM_PEAK_BYTES_MAX)]
    sandbox: _Level = 2
    group: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{32})?$")] = ""
    replica: Annotated[int, msgspec.Meta(ge=0, lt=params.SCRIPT_REPLICAS_MAX)] = 0
    sealed: bool = False
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: _Count = 0
    deadline_ns: _Count = 0
    credit: bool = False


class SubmitUnit(msgspec.Struct, forbid_unknown_fields=True):
    """One unit of submit-run: its encoded TaskSpec, and what it takes. kept: this peer runs it itself."""

    task: Annotated[_Hex, msgspec.Meta(max_length=2 * params.MESSAGE_BYTES_MAX)]
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.BLOB_BYTES_MAX)]
    memory_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.PROGRAM_PEAK_BYTES_MAX)]
    kept: bool = False


class SubmitRun(msgspec.Struct, forbid_unknown_fields=True):
    """Of submit-run: the units of a parallel job in the order of their numbers, and money in micro-credits.

    For the placing, as it travels: border_bytes, of each border between stages what crosses it forward and backward in
    a step; shared_bytes, of each stage what a replica sends each other one in an exchange. Empty: not known.
    """

    units: Annotated[list[SubmitUnit], msgspec.Meta(min_length=1, max_length=params.PARALLEL_UNITS_MAX)]
    budget_micro: _Amount
    unit_price_max: _Price
    sandbox: _Level = 2
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: _Count = 0
    deadline_ns: _Count = 0
    border_bytes: Annotated[list[tuple[_Count, _Count]], msgspec.Meta(max_length=params.PARALLEL_UNITS_MAX)] = []
    shared_bytes: Annotated[list[_Count], msgspec.Meta(max_length=params.PARALLEL_UNITS_MAX)] = []


class PlanRun(msgspec.Struct, forbid_unknown_fields=True):
    """Of plan-run: what a parallel job would send by each way that is open, and what its solvers must have.
    unit_price_max: 0 where it is not known yet."""

    sizes: RunSizes
    unit_price_max: _Count = 0
    memory_bytes: _Count = 0
    sandbox: _Level = 2
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: _Count = 0


class _CreditGive(msgspec.Struct, forbid_unknown_fields=True):
    """Of credit-give: to whom, how much at most, and for how many days."""

    peer: Annotated[str, msgspec.Meta(max_length=64)]
    limit_micro: _Amount
    days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 90


class _Since(msgspec.Struct, forbid_unknown_fields=True):
    """Of earnings: from when on, in ns since the epoch."""

    since_ns: _Count = 0


class _Finish(msgspec.Struct, forbid_unknown_fields=True):
    """Of finish: true to take nothing new, false to take new work again. Of house-want: whether to take part."""

    on: bool = True


class _Quote(msgspec.Struct, forbid_unknown_fields=True):
    """Of quote: how much work, and what its solver must have. segments: of the job, so that its checks are counted."""

    operations: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    unit_price_max: _Price | None = None
    memory_bytes: _Count = 0
    sandbox: _Level = 2
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: _Count = 0
    segments: Annotated[int, msgspec.Meta(ge=0, le=params.TASK_SEGMENTS_MAX)] = 0
    operations_per_segment: _Count = 0


class _Pick(msgspec.Struct, forbid_unknown_fields=True):
    """Of book, offers and trades: a filter, a key to sort by, how many rows at most (0: all)."""

    where: Annotated[str, msgspec.Meta(max_length=params.FILTER_CHARS_MAX)] = ""
    sort: Annotated[str, msgspec.Meta(max_length=64)] = ""
    limit: Annotated[int, msgspec.Meta(ge=0, le=params.ROWS_SHOWN_MAX)] = 0


class _PriceOf(msgspec.Struct, forbid_unknown_fields=True):
    """Of price: a limit to pay or, with sell, an ask; what a job needs; watts and the price of a kilowatt-hour."""

    sell: bool = False
    memory_bytes: _Count = 0
    sandbox: _Level = 2
    watts: Annotated[int, msgspec.Meta(ge=0, le=10**7)] = 0
    kwh_micro: Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)] = 0
    with_own: bool = False


class _Why(msgspec.Struct, forbid_unknown_fields=True):
    """Of why: "me", the beginning of a job's id, or nothing for all that is wrong here."""

    of: Annotated[str, msgspec.Meta(pattern="^(me|[0-9a-f]{0,64})$")] = ""


class _Wallet(msgspec.Struct, forbid_unknown_fields=True):
    """Of wallet: whether to show everybody's buckets."""

    all: bool = False


class _StakeMove(msgspec.Struct, forbid_unknown_fields=True):
    """Of stake and unstake: how much."""

    amount_micro: _Amount


class _Pause(msgspec.Struct, forbid_unknown_fields=True):
    """Of pause: how long workers may take to hand over their state; 0 kills them at once."""

    within_ms: Annotated[int, msgspec.Meta(ge=0, le=1000 * params.SUSPEND_SECONDS_MAX)] = 1000 * params.SUSPEND_SECONDS


class _Bench(msgspec.Struct, forbid_unknown_fields=True):
    """Of bench: who is to challenge us (else anybody connected), and how much memory to prove."""

    peer: Annotated[str, msgspec.Meta(max_length=64)] = ""
    memory_bytes: _Count | None = None


class _Challenge(msgspec.Struct, forbid_unknown_fields=True):
    """Of challenge: the peers to be challenged; none for all connected solvers."""

    peers: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=params.BENCH_OPEN_MAX)
    ] = []


VERBS: Final[dict[str, type[msgspec.Struct]]] = {
    "status": _Nothing,
    "jobs": _Nothing,
    "book": _Pick,
    "offers": _Pick,
    "trades": _Pick,
    "price": _PriceOf,
    "why": _Why,
    "job": _OneJob,
    "cancel": _OneJob,
    "bundle": _OneJob,
    "matches": _OneJob,
    "submit": Submit,
    "plan-run": PlanRun,
    "submit-run": SubmitRun,
    "quote": _Quote,
    "wallet": _Wallet,
    "stake": _StakeMove,
    "unstake": _StakeMove,
    "pause": _Pause,
    "resume": _Nothing,
    "finish": _Finish,
    "earnings": _Since,
    "house": _Nothing,
    "house-want": _Finish,
    "bench": _Bench,
    "challenge": _Challenge,
    "cards": _Nothing,
    "drops": _Nothing,
    "disputes": _Nothing,
    "dispute": _OneDispute,
    "dispute-bundle": _OneDispute,
    "reputation": _Reputation,
    "reputation-bundle": _OnePeer,
    "credit": _Nothing,
    "credit-give": _CreditGive,
    "credit-revoke": _OnePeer,
    "credit-net": _OnePeer,
}
