"""Profiling and tolerant verdicts (DESIGN §5.2): how far honest runs of one task lie apart, and what lies too far.

Pure rules over arrays and records; who runs the configurations is worker/profiling.py. Distances are whole parts per
billion (ppb) of an honest update. Two norms are kept, each with a threshold of its own. L1, the mean change: in the
first steps of Adam an element whose gradient is near zero moves a whole learning rate by the sign of its noise, and
in L2 one such element outweighs all the others (measured in docs/decisions/0009-tolerant-mode.md). L2, because in L1
one weight could be moved by as many updates as its tensor has millions of elements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.codec import Digest, PeerKey, Uint, blake, encode
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord

__all__ = [
    "EXACT",
    "KERNELS",
    "UNBOUNDED",
    "Distance",
    "Findings",
    "Gauge",
    "Kernels",
    "Measured",
    "Profile",
    "ProfilesDisagree",
    "Tolerance",
    "ToleranceRefused",
    "assess",
    "check_profile",
    "combine",
    "distance",
    "finding",
    "put_back",
    "refuse_tolerance",
    "tolerance_id",
    "tolerance_of",
]

State = Mapping[str, NDArray[Any]]

PPB: Final = 10**9
UNBOUNDED: Final = 10**18
"""The distance of what no noise explains: another integer, a number that is not finite, a frozen weight moved."""

EXACT: Final = bytes(32)
"""Stands for the tolerance of a task that has none."""

_ULP: Final = 2.0**-24  # half a unit in the last place: a smaller update cannot be told from rounding
_CHUNK: Final = 1 << 20  # elements turned into float64 at a time


@dataclass(frozen=True)
class Kernels:
    """One way to compute the same steps. environment: what torch and MKL read when they start. judges: whether its
    distance counts for the threshold; exact arithmetic rounds operands, so it lies further away than any float32."""

    name: str
    mode: Literal["tolerant", "exact"]
    threads: int
    environment: Mapping[str, str]
    width: Literal[8, 15, 22] = 15
    judges: bool = True


KERNELS: Final = (
    Kernels("avx2-1", "tolerant", 1, {"ATEN_CPU_CAPABILITY": "avx2"}),
    Kernels("avx2-2", "tolerant", 2, {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}),
    Kernels("default-1", "tolerant", 1, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
    Kernels("default-2", "tolerant", 2, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "SSE4_2"}),
    Kernels("exact-22", "exact", 1, {}, width=22, judges=False),
)
"""The configurations of a profile; the first is the one that the others are measured against."""
_BY_NAME: Final = {kernels.name: kernels for kernels in KERNELS}


class Gauge(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """State that trains on noise alone, as an attention's key bias, which softmax ignores.

    Of the tensor `name`, cut in `parts` equal parts of its first dimension, the parts numbered `at`: of a fused bias of
    queries, keys and values the second of three.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=params.GAUGE_PARTS_MAX)]
    at: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.GAUGE_PARTS_MAX)]


class Measured(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The largest distance of one configuration to any other that judges, over all tensors and segments."""

    kernels: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    l1_ppb: Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]
    l2_ppb: Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]


class Profile(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/profile/1"
):
    """A verifier's signed measurement of a task. Thresholds are not in it: everybody derives them (`tolerance_of`).

    other_seed_ppb: how far (L1) a run with the second seed ended: the distance of a fraud with other data, never a
    threshold. Of an exact task only the speed is measured: the rest is empty.
    """

    network: Digest
    task: Digest
    verifier: PeerKey
    mode: Literal["exact", "tolerant"]
    segments: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.PROFILE_SEGMENTS)]
    seeds: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=2)]
    measured: Annotated[tuple[Measured, ...], msgspec.Meta(max_length=len(KERNELS))]
    other_seed_ppb: Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]
    gauges: Annotated[tuple[Gauge, ...], msgspec.Meta(max_length=params.GAUGES_MAX)]
    operations_per_second: Uint
    created_ns: Uint


class ProfilesDisagree(IchibaError):
    """Too few profiles, or none that enough verifiers confirm."""

    code = "profiles-disagree"


class ToleranceRefused(IchibaError):
    """Honest runs of this task lie too far apart for frauds to show."""

    code = "tolerance-refused"


class Distance(NamedTuple):
    """How far one state lies from another, in ppb of the honest update; `name` is the tensor where it is largest."""

    l1_ppb: int
    l2_ppb: int
    name: str


@dataclass(frozen=True)
class Tolerance:
    """What a verdict goes by: thresholds in ppb of a segment's update, and the parts it leaves out."""

    l1_ppb: int
    l2_ppb: int
    gauges: tuple[Gauge, ...]


@dataclass(frozen=True)
class Findings:
    """What one profile found. unmasked: as `measured` would be without the gauge parts left out."""

    measured: tuple[Measured, ...]
    unmasked: tuple[Measured, ...]
    gauges: tuple[Gauge, ...]
    other_seed_ppb: int


# --- distances ---------------------------------------------------------------------------------------------
@dataclass
class _Norms:
    """Of a difference, an update and the weights themselves: sums of magnitudes and of squares."""

    d1: float = 0.0
    d2: float = 0.0
    u1: float = 0.0
    u2: float = 0.0
    w1: float = 0.0
    w2: float = 0.0

    def add(self, base: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        """Add flat arrays of one length."""
        for first in range(0, base.size, _CHUNK):
            cut = slice(first, first + _CHUNK)
            w, o, t = (x[cut].astype(np.float64) for x in (base, ours, theirs))
            d, u = np.abs(t - o), np.abs(o - w)
            self.d1, self.d2 = self.d1 + float(d.sum()), self.d2 + float(d @ d)
            self.u1, self.u2 = self.u1 + float(u.sum()), self.u2 + float(u @ u)
            self.w1, self.w2 = self.w1 + float(np.abs(w).sum()), self.w2 + float(w @ w)

    def ppb(self) -> tuple[int, int]:
        """The two distances. Of an update below the weights' rounding the rounding is the measure."""
        first = _ratio(self.d1, max(self.u1, _ULP * self.w1))
        return first, _ratio(math.sqrt(self.d2), max(math.sqrt(self.u2), _ULP * math.sqrt(self.w2)))


def _ratio(difference: float, update: float) -> int:
    if not math.isfinite(difference) or not math.isfinite(update):
        return UNBOUNDED
    if difference == 0:
        return 0
    return UNBOUNDED if update == 0 else min(UNBOUNDED, math.ceil(difference / update * PPB))


def distance(base: State, ours: State, theirs: State, gauges: Sequence[Gauge]) -> Distance:
    """How far the end `theirs` lies from `ours`, both of one segment that began at `base`.

    The three hold the same tensors; per tensor |theirs - ours| / |ours - base|, the largest of all. Gauge parts are as
    they were at the base in both (`put_back`), else the distance is UNBOUNDED: they hide nothing.
    """
    worst = Distance(0, 0, "")
    masks = {gauge.name: gauge for gauge in gauges}
    for name in sorted(base):
        parts = [x[name].reshape(-1) for x in (base, ours, theirs)]
        if base[name].dtype.kind != "f":
            found = (0, 0) if np.array_equal(parts[1], parts[2]) else (UNBOUNDED, UNBOUNDED)
        else:
            gauge = masks.get(name)
            if gauge is not None:
                parts = [_without(x[name], gauge) for x in (base, ours, theirs)]
            norms = _Norms()
            norms.add(*parts)
            found = norms.ppb()
            if gauge is not None and not np.array_equal(_only(base[name], gauge), _only(theirs[name], gauge)):
                found = (UNBOUNDED, UNBOUNDED)
        if found[0] > worst.l1_ppb or not worst.name:
            worst = Distance(found[0], worst.l2_ppb, name)
        worst = worst._replace(l2_ppb=max(worst.l2_ppb, found[1]))
    return worst


def _cut(x: NDArray[Any], gauge: Gauge) -> NDArray[Any]:
    if not x.size or (x.shape[0] if x.ndim else 1) % gauge.parts:
        raise MalformedRecord(f"{gauge.name} of shape {x.shape} has no {gauge.parts} equal parts")
    return x.reshape(gauge.parts, -1)


def _only(x: NDArray[Any], gauge: Gauge) -> NDArray[Any]:
    return _cut(x, gauge)[list(gauge.at)].reshape(-1)


def _without(x: NDArray[Any], gauge: Gauge) -> NDArray[Any]:
    return np.delete(_cut(x, gauge), list(gauge.at), axis=0).reshape(-1)


def put_back(base: State, end: State, gauges: Sequence[Gauge]) -> dict[str, NDArray[Any]]:
    """The tensors of `end` that have gauge parts, with these as they were at `base`: the end of a tolerant segment.

    So each gauge part stays what the task began with. Raises MalformedRecord for a gauge of no such tensor.
    """
    changed = {}
    for gauge in gauges:
        if gauge.name not in end or end[gauge.name].dtype.kind != "f":
            raise MalformedRecord(f"a gauge of {gauge.name}, which is no float32 of the state")
        whole = end[gauge.name].copy()
        _cut(whole, gauge)[list(gauge.at)] = _cut(base[gauge.name], gauge)[list(gauge.at)]
        changed[gauge.name] = whole
    return changed


# --- from runs to findings ---------------------------------------------------------------------------------
def assess(segments: Sequence[tuple[State, Mapping[str, State]]], other_seed: State | None) -> Findings:
    """Gauges and distances from the ends of the same segments under several kernels.

    segments: of each its base, and its end by the name of the kernels, the same names in each. other_seed: the end of
    the first segment with another seed, None if there is none.
    """
    gauges = _find_gauges(segments)
    names = list(segments[0][1])
    measured: list[Measured] = []
    unmasked: list[Measured] = []
    for name in names:
        pairs = [
            (base, ends[other], ends[name])
            for base, ends in segments
            for other in names
            if other != name and _BY_NAME[other].judges
        ]
        plain = [distance(base, ours, theirs, ()) for base, ours, theirs in pairs]
        masked = [
            distance(base, _committed(base, ours, gauges), _committed(base, theirs, gauges), gauges)
            for base, ours, theirs in pairs
        ]
        for found, into in ((plain, unmasked), (masked, measured)):
            into.append(Measured(name, max(d.l1_ppb for d in found), max(d.l2_ppb for d in found)))
    spread = 0
    if other_seed is not None:
        base, ends = segments[0]
        spread = max(
            _norms_of(base[name], ends[names[0]][name], other_seed[name]).ppb()[0]
            for name in base
            if base[name].dtype.kind == "f"
        )
    return Findings(tuple(measured), tuple(unmasked), gauges, spread)


def _committed(base: State, end: State, gauges: Sequence[Gauge]) -> State:
    return {**end, **put_back(base, end, gauges)}


def _norms_of(base: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]) -> _Norms:
    norms = _Norms()
    norms.add(base.reshape(-1), ours.reshape(-1), theirs.reshape(-1))
    return norms


def _find_gauges(segments: Sequence[tuple[State, Mapping[str, State]]]) -> tuple[Gauge, ...]:
    """The noisy among each tensor's fewest equal parts of which every one is noisy in all segments or quiet in all.

    A noisy part holds nothing quiet at any finer cut: the noise of a key bias is louder than the updates beside it.
    """
    found = []
    for name, first in sorted(segments[0][0].items()):
        if first.dtype.kind != "f" or not first.size or bool(_noise(name, 1, segments)[1].all()):
            continue
        rows = first.shape[0] if first.ndim else 1
        finest = min(params.GAUGE_PARTS_MAX, first.size // params.GAUGE_PART_ELEMENTS_MIN)
        noises = {k: _noise(name, k, segments) for k in range(1, finest + 1) if rows % k == 0}
        for parts, (noisy, quiet) in noises.items():
            holds_quiet = np.zeros(parts, bool)
            for finer, (_, silent) in noises.items():
                if finer % parts == 0:
                    holds_quiet |= silent.reshape(parts, -1).any(axis=1)
            if bool(((noisy & ~holds_quiet) | quiet).all()):
                found.append(Gauge(name, parts, tuple(int(i) for i in np.flatnonzero(noisy & ~quiet))))
                break
    if len(found) > params.GAUGES_MAX:
        raise LimitExceeded(f"{len(found)} gauge tensors, at most {params.GAUGES_MAX}")
    return tuple(found)


def _noise(
    name: str, parts: int, segments: Sequence[tuple[State, Mapping[str, State]]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the parts are noise in every segment, and which are quiet in every one."""
    noisy, quiet = np.ones(parts, bool), np.ones(parts, bool)
    for base, ends in segments:
        judging = [ends[other][name].reshape(parts, -1) for other in ends if _BY_NAME[other].judges]
        before = base[name].reshape(parts, -1)
        for part in range(parts):
            norms = [_norms_of(before[part], judging[0][part], end[part]) for end in judging[1:]]
            worst = max(norms, key=lambda n: n.d1)
            beyond_rounding = worst.d1 > params.GAUGE_ULPS_MIN * _ULP * worst.w1
            share = worst.ppb()[0]
            noisy[part] &= beyond_rounding and share >= params.GAUGE_NOISE_PPB_MIN
            quiet[part] &= share <= params.TOLERANCE_PPB_MAX
    return noisy, quiet


# --- from profiles to verdicts -----------------------------------------------------------------------------
def check_profile(profile: Profile) -> None:
    """Refuse what the rule cannot have given. Raises MalformedRecord."""
    if profile.mode == "exact":
        if profile.measured or profile.gauges or profile.other_seed_ppb:
            raise MalformedRecord("the profile of an exact task measures its speed alone")
        return
    names = [one.kernels for one in profile.measured]
    if len(set(names)) != len(names) or not set(names) <= set(_BY_NAME):
        raise MalformedRecord(f"a profile of the kernels {', '.join(names)[:200]}")
    if sum(_BY_NAME[name].judges for name in names) < params.PROFILE_KERNELS_MIN:
        raise MalformedRecord(f"a profile of {len(names)} kernels, at least {params.PROFILE_KERNELS_MIN} must judge")
    if len(set(profile.seeds)) != 2:
        raise MalformedRecord("a profile of one seed does not say how large an honest update is")
    if [gauge.name for gauge in profile.gauges] != sorted({gauge.name for gauge in profile.gauges}):
        raise MalformedRecord("gauges are not in strict order of their names")
    for gauge in profile.gauges:
        if list(gauge.at) != sorted(set(gauge.at)) or gauge.at[-1] >= gauge.parts:
            raise MalformedRecord(f"parts {gauge.at} of {gauge.parts} of the gauge {gauge.name}")


def tolerance_of(profile: Profile | Findings) -> Tolerance:
    """The fixed rule: a threshold is THRESHOLD_FACTOR times the largest profiled distance, and never below a floor."""
    judging = [one for one in profile.measured if _BY_NAME[one.kernels].judges]
    most = [max((getattr(one, key) for one in judging), default=0) for key in ("l1_ppb", "l2_ppb")]
    l1, l2 = (min(UNBOUNDED, max(params.TOLERANCE_PPB_MIN, params.THRESHOLD_FACTOR * ppb)) for ppb in most)
    return Tolerance(l1, l2, profile.gauges)


def combine(profiles: Sequence[Profile]) -> Tolerance:
    """One tolerance from the profiles of several verifiers. The caller knows that they are staked and of one task.

    More than half must name the same gauges, and at least PROFILES_MIN; of their thresholds the lower median counts, so
    of two the smaller. One liar then loosens nothing: of two it can only tighten, and where its figure is less than the
    other's by more than PROFILE_FACTOR_MAX the two disagree and a third is asked. Raises ProfilesDisagree.
    """
    by_verifier = {profile.verifier: profile for profile in profiles}
    if len(by_verifier) < params.PROFILES_MIN:
        raise ProfilesDisagree(
            f"{len(by_verifier)} verifiers have profiled the task, {params.PROFILES_MIN} are needed",
            next_step="wait for another verifier with a stake",
        )
    for profile in by_verifier.values():
        check_profile(profile)
    gauges, count = Counter(p.gauges for p in by_verifier.values()).most_common(1)[0]
    if count < params.PROFILES_MIN or 2 * count <= len(by_verifier):
        raise ProfilesDisagree(
            f"{len(by_verifier)} profiles name different gauge parameters", next_step="ask another verifier"
        )
    agreeing = [tolerance_of(p) for p in by_verifier.values() if p.gauges == gauges]
    middle = (len(agreeing) - 1) // 2
    l1, l2 = (sorted(getattr(t, key) for t in agreeing) for key in ("l1_ppb", "l2_ppb"))
    if len(agreeing) == 2 and any(k[1] > params.PROFILE_FACTOR_MAX * k[0] for k in (l1, l2)):
        raise ProfilesDisagree(
            f"two profiles give thresholds of {l1[0]} and {l1[1]} ppb (L2 {l2[0]} and {l2[1]})",
            why=f"they lie more than a factor of {params.PROFILE_FACTOR_MAX} apart",
            next_step="ask another verifier",
        )
    return Tolerance(l1[middle], l2[middle], gauges)


def tolerance_id(tolerance: Tolerance) -> bytes:
    """What an agreement binds: the hash of both thresholds and the gauges, 32 bytes."""
    return blake("ichiba/tolerance", encode((tolerance.l1_ppb, tolerance.l2_ppb, tolerance.gauges)))


def refuse_tolerance(tolerance: Tolerance, segments: int) -> None:
    """Refuse a task of so many segments whose honest noise leaves frauds room. Raises ToleranceRefused."""
    advice = 'set mode = "exact" in job.toml'
    if tolerance.l1_ppb > params.TOLERANCE_PPB_MAX or tolerance.l2_ppb > params.TOLERANCE_L2_PPB_MAX:
        raise ToleranceRefused(
            f"honest runs lie so far apart that the threshold would be {tolerance.l1_ppb / PPB:.1e} of an update "
            f"(L2 {tolerance.l2_ppb / PPB:.1e})",
            why=f"above {params.TOLERANCE_PPB_MAX / PPB:g} (L2 {params.TOLERANCE_L2_PPB_MAX / PPB:g}) lower precision "
            "passes unseen",
            next_step=f"{advice}; a warmup of the learning rate and longer segments also lower it",
        )
    drift = segments * tolerance.l1_ppb
    if drift > params.DRIFT_PPB_MAX:
        raise ToleranceRefused(
            f"{segments} segments at a threshold of {tolerance.l1_ppb / PPB:.1e} leave {drift / PPB:.1%} of the path",
            why=f"above {params.DRIFT_PPB_MAX / PPB:.0%} a solver could steer the result unseen",
            next_step=f"{advice}, or make at most {params.DRIFT_PPB_MAX // tolerance.l1_ppb} segments",
        )


def finding(
    found: Distance, tolerance: Tolerance, *, asked: Literal["first", "second", "juror"] = "first"
) -> Literal["right", "unsure", "wrong"]:
    """What a distance means to who measured it. Each norm is judged by its own threshold, and the worse counts.

    Right up to the threshold, wrong above UNSURE_FACTOR times of it; between, the first is unsure and a second verifier
    decides, up to SECOND_FACTOR thresholds for the solver. A juror decides by the threshold alone, so that who accuses,
    always of more than twice as much, is not let down by the noise between honest machines.
    """
    pairs = ((found.l1_ppb, tolerance.l1_ppb), (found.l2_ppb, tolerance.l2_ppb))
    factor = params.SECOND_FACTOR if asked == "second" else 1
    if all(ppb <= factor * most for ppb, most in pairs):
        return "right"
    far = any(ppb > params.UNSURE_FACTOR * most for ppb, most in pairs)
    return "wrong" if far or asked != "first" else "unsure"
