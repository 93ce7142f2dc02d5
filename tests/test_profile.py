"""Profiling and tolerant verdicts: honest noise below the threshold, frauds above, gauges found and put back."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from protocol import params
from protocol.errors import MalformedRecord
from protocol.keys import SigningKey
from protocol.profile import (
    KERNELS,
    UNBOUNDED,
    Distance,
    Gauge,
    Measured,
    Profile,
    ProfilesDisagree,
    Tolerance,
    ToleranceRefused,
    assess,
    check_profile,
    combine,
    distance,
    finding,
    put_back,
    refuse_tolerance,
    tolerance_of,
)
from protocol.records import open_record, seal

JUDGES = [kernels.name for kernels in KERNELS if kernels.judges]
Arrays = dict[str, NDArray[Any]]


def noisy_segment(seed: int, noise: float = 1e-6) -> tuple[Arrays, dict[str, Arrays]]:
    """A state and its honest ends: a weight, a bias whose middle third trains on noise, a counter, frozen zeros."""
    rng = np.random.default_rng(seed)
    base: Arrays = {
        "bias": rng.normal(0, 0.1, 24).astype(np.float32),
        "count": np.array([7], np.int64),
        "frozen": np.zeros(5, np.float32),
        "weight": rng.normal(0, 0.1, (12, 16)).astype(np.float32),
    }
    moves = {name: rng.normal(0, 1e-2, base[name].shape) for name in ("bias", "weight")}
    ends: dict[str, Arrays] = {}
    for kernels in KERNELS:
        end = {**base, "count": np.array([8], np.int64)}
        for name, move in moves.items():
            apart = move * (1 + rng.normal(0, noise, move.shape))
            if name == "bias":
                apart[8:16] = rng.normal(0, 1e-2, 8)
            end[name] = (base[name] + apart).astype(np.float32)
        ends[kernels.name] = end
    return base, ends


def profile_of(l1_ppb: int, *, verifier: int = 0, gauges: tuple[Gauge, ...] = (), **fields: Any) -> Profile:
    given: dict[str, Any] = {
        "network": bytes(32), "task": bytes(32), "verifier": bytes([verifier]) * 32, "mode": "tolerant",
        "segments": (0, 1), "seeds": (1, 2),
        "measured": tuple(Measured(name, l1_ppb, 5 * l1_ppb) for name in JUDGES),
        "other_seed_ppb": 10**9, "gauges": gauges, "operations_per_second": 1, "created_ns": 0, **fields,
    }  # fmt: skip
    return Profile(**given)


# --- gauges and distances ----------------------------------------------------------------------------------
def test_a_fused_bias_is_a_gauge_in_the_part_that_trains_on_noise() -> None:
    segments = [noisy_segment(1), noisy_segment(2)]
    found = assess(segments, segments[1][1][JUDGES[0]])
    assert found.gauges == (Gauge("bias", 3, (1,)),)
    assert max(one.l1_ppb for one in found.unmasked) > 10**8
    tolerance = tolerance_of(found)
    assert params.TOLERANCE_PPB_MIN < tolerance.l1_ppb < 30_000
    refuse_tolerance(tolerance, 10)
    assert found.other_seed_ppb > 10**9, "another seed moves the weights elsewhere"


def test_noise_in_one_segment_alone_is_no_gauge() -> None:
    base, ends = noisy_segment(1)
    quiet = {name: {**end, "bias": ends[JUDGES[0]]["bias"]} for name, end in ends.items()}
    found = assess([(base, ends), (base, quiet)], None)
    assert found.gauges == ()
    with pytest.raises(ToleranceRefused, match="so far apart"):
        refuse_tolerance(tolerance_of(found), 1)


def test_exact_kernels_are_measured_and_do_not_judge() -> None:
    base, ends = noisy_segment(1)
    far = {**ends["exact-22"], "weight": ends["exact-22"]["weight"] * np.float32(1.01)}
    found = assess([(base, {**ends, "exact-22": far})], None)
    assert next(one for one in found.measured if one.kernels == "exact-22").l1_ppb > 10**6
    assert tolerance_of(found).l1_ppb < 30_000


def test_gauge_parts_that_were_not_put_back_are_fraud() -> None:
    base, ends = noisy_segment(1)
    gauges = (Gauge("bias", 3, (1,)),)
    ours = {**ends["avx2-1"], **put_back(base, ends["avx2-1"], gauges)}
    theirs = {**ends["default-1"], **put_back(base, ends["default-1"], gauges)}
    assert np.array_equal(theirs["bias"][8:16], base["bias"][8:16])
    assert not np.array_equal(theirs["bias"][:8], base["bias"][:8])
    assert distance(base, ours, theirs, gauges).l1_ppb < 10_000
    hidden = {**theirs, "bias": theirs["bias"].copy()}
    hidden["bias"][9] += np.float32(1e-3)
    assert distance(base, ours, hidden, gauges).l1_ppb == UNBOUNDED


@pytest.mark.parametrize(("name", "value"), [("count", 9), ("frozen", 1e-9), ("weight", np.nan), ("weight", np.inf)])
def test_what_no_noise_explains_is_beyond_every_threshold(name: str, value: float) -> None:
    base, ends = noisy_segment(1)
    ours, theirs = ends["avx2-1"], copy.deepcopy(ends["avx2-1"])
    assert distance(base, ours, theirs, ())[:2] == (0, 0)
    theirs[name].reshape(-1)[0] = value
    found = distance(base, ours, theirs, ())
    assert found == Distance(UNBOUNDED, UNBOUNDED, name)
    assert finding(found, Tolerance(10**6, 10**7, ())) == "wrong"


def test_one_weight_moved_far_shows_in_the_second_norm() -> None:
    rng = np.random.default_rng(3)
    base = {"weight": np.zeros(1_000_000, np.float32)}
    ours = {"weight": rng.choice(np.float32([-1e-3, 1e-3]), 1_000_000)}
    theirs = {"weight": ours["weight"].copy()}
    theirs["weight"][77] += np.float32(3e-3)
    found = distance(base, ours, theirs, ())
    assert found.l1_ppb <= params.TOLERANCE_PPB_MIN + 1, "three updates of one weight hide among a million"
    assert finding(found, Tolerance(params.TOLERANCE_PPB_MIN + 1, 30_000, ())) == "wrong"


@pytest.mark.parametrize("gauge", [Gauge("bias", 5, (1,)), Gauge("count", 1, (0,)), Gauge("other", 1, (0,))])
def test_a_gauge_that_does_not_fit_the_state_is_refused(gauge: Gauge) -> None:
    base, ends = noisy_segment(1)
    with pytest.raises(MalformedRecord):
        put_back(base, ends["avx2-1"], (gauge,))


# --- the fixed rules ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("l1", "l2", "expected"),
    [(9, 9, "right"), (10, 100, "right"), (11, 9, "unsure"), (9, 101, "unsure"), (100, 9, "unsure"), (101, 9, "wrong"),
     (9, 1001, "wrong")],
)  # fmt: skip
def test_a_verdict_is_right_unsure_or_wrong_by_both_norms(l1: int, l2: int, expected: str) -> None:
    assert finding(Distance(l1, l2, "w"), Tolerance(10, 100, ())) == expected


def test_a_threshold_is_three_times_the_largest_distance_and_not_below_the_floor() -> None:
    assert tolerance_of(profile_of(10_000)) == Tolerance(30_000, 150_000, ())
    assert tolerance_of(profile_of(0)) == Tolerance(params.TOLERANCE_PPB_MIN, params.TOLERANCE_PPB_MIN, ())


def test_drift_over_one_percent_and_thresholds_over_a_thousandth_are_refused() -> None:
    refuse_tolerance(Tolerance(10**6, 10**7, ()), 10)
    with pytest.raises(ToleranceRefused, match="11 segments") as refusal:
        refuse_tolerance(Tolerance(10**6, 10**7, ()), 11)
    assert "exact" in refusal.value.next_step and "at most 10 segments" in refusal.value.next_step
    for tolerance in (Tolerance(10**6 + 1, 0, ()), Tolerance(1, 10**7 + 1, ())):
        with pytest.raises(ToleranceRefused, match="so far apart"):
            refuse_tolerance(tolerance, 1)


def test_one_lying_verifier_loosens_nothing() -> None:
    honest, loose = profile_of(10_000, verifier=1), profile_of(90_000, verifier=2)
    assert combine([honest, loose]).l1_ppb == 30_000, "of two the smaller counts"
    with pytest.raises(ProfilesDisagree, match="lie more than"):
        combine([honest, profile_of(200_000, verifier=2)])
    with pytest.raises(ProfilesDisagree):
        combine([honest, profile_of(0, verifier=2, measured=tuple(Measured(name, 0, 0) for name in JUDGES))])
    third = profile_of(12_000, verifier=3)
    for liar in (profile_of(0, verifier=2), profile_of(10**9, verifier=2)):
        assert 30_000 <= combine([honest, third, liar]).l1_ppb <= 36_000


def test_a_gauge_that_one_verifier_invents_freezes_nothing() -> None:
    invented = (Gauge("weight", 1, (0,)),)
    first, second, liar = (
        profile_of(1, verifier=1),
        profile_of(1, verifier=2),
        profile_of(1, verifier=3, gauges=invented),
    )
    with pytest.raises(ProfilesDisagree, match="gauge"):
        combine([first, liar])
    assert combine([first, second, liar]).gauges == ()
    with pytest.raises(ProfilesDisagree, match="1 verifiers"):
        combine([first, first])


@pytest.mark.parametrize(
    "fields",
    [
        {"measured": tuple(Measured(name, 1, 1) for name in JUDGES[:3])},
        {"measured": tuple(Measured(name, 1, 1) for name in [*JUDGES[:3], "exact-22"])},
        {"measured": tuple(Measured(name, 1, 1) for name in [*JUDGES[:3], "abacus"])},
        {"measured": tuple(Measured(JUDGES[0], 1, 1) for _ in JUDGES)},
        {"seeds": (1, 1)},
        {"gauges": (Gauge("b", 1, (0,)), Gauge("a", 1, (0,)))},
        {"gauges": (Gauge("a", 2, (2,)),)},
        {"mode": "exact"},
    ],
)
def test_a_profile_that_the_rule_cannot_give_is_refused(fields: dict[str, Any]) -> None:
    check_profile(profile_of(1))
    with pytest.raises(MalformedRecord):
        check_profile(profile_of(1, **fields))


def test_a_profile_is_a_record_signed_by_its_verifier() -> None:
    key = SigningKey.from_seed(bytes(32))
    profile = msgspec.structs.replace(profile_of(5, gauges=(Gauge("bias", 3, (1,)),)), verifier=key.public)
    opened, _, signers = open_record(seal(profile, key), network=bytes(32))
    assert opened == profile and signers == {key.public}


def test_the_largest_profile_fits_one_record() -> None:
    names = [f"optimizer.mean.transformer.blocks.{i:03}.attention.bias" for i in range(params.GAUGES_MAX)]
    gauges = tuple(Gauge(name, 3, (1,)) for name in names)
    sealed = seal(profile_of(1, gauges=gauges), SigningKey.from_seed(bytes(32)))
    assert len(sealed) < params.GOSSIP_RECORD_BYTES_MAX
