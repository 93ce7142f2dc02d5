"""A profile as a piece of paid work: what a verifier runs, what that costs, and what its signed answer must say.

A profile is a deal like any other, as a script is: one step in one segment, of which nothing is re-executed. Its
answer is a sealed `Profile`, whose hash its receipt binds. Only the configurations that judge are run: exact kernels,
the fifth of KERNELS, would cost the most and decide nothing. Pure: it runs nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, blake, decode
from protocol.errors import MalformedRecord, VerificationFailed, WrongNetwork
from protocol.profile import KERNELS, Findings, Kernels, Profile, check_profile
from protocol.task import TaskSpec, task_id

__all__ = [
    "MARKET_KERNELS",
    "ProfileSpec",
    "check_answer",
    "profile_from",
    "profile_root",
    "seeds_of",
    "segments_of",
]

MARKET_KERNELS: Final[tuple[Kernels, ...]] = tuple(kernels for kernels in KERNELS if kernels.judges)
"""What a verifier runs, in this order; the first is what the others are measured against."""


def segments_of(task: TaskSpec) -> tuple[int, ...]:
    """The segments that are profiled."""
    return tuple(range(min(params.PROFILE_SEGMENTS, task.segments)))


def seeds_of(task: TaskSpec) -> tuple[int, int]:
    """The task's own seed, and the one that says how large an honest update is."""
    return task.seed, task.seed ^ 1


class ProfileSpec(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/profile-task/1", kw_only=True
):
    """The order of one profile. of: the tolerant task it is about. number: which of that task's profiles, from 0."""

    network: Digest
    of: TaskSpec
    number: Annotated[int, msgspec.Meta(ge=0, lt=params.PROFILES_KEPT_MAX)]

    segments: ClassVar[int] = 1
    steps: ClassVar[int] = 1
    steps_per_segment: ClassVar[int] = 1
    mode: ClassVar[Literal["profile"]] = "profile"

    @property
    def steps_run(self) -> int:
        """Training steps of all configurations together: each runs every profiled segment, and the first also its
        first segment with the other seed."""
        whole = sum(len(self.of.steps_of(segment)) for segment in segments_of(self.of))
        return len(MARKET_KERNELS) * whole + len(self.of.steps_of(0))

    @property
    def operations_per_step(self) -> int:
        """What a profile is charged: the operations of all steps it runs."""
        return self.steps_run * self.of.operations_per_step

    @property
    def program(self) -> bytes:
        """The program of the task."""
        return self.of.program

    @property
    def seed(self) -> int:
        """The seed of the task."""
        return self.of.seed

    @property
    def name(self) -> str:
        """For people."""
        return f"profile {self.number} of {self.of.name}"[:256]

    def steps_of(self, segment: int) -> range:
        """The steps of the one segment."""
        if segment != 0:
            raise MalformedRecord(f"segment {segment} of a profile, which is one segment")
        return range(1)

    @classmethod
    def from_bytes(cls, data: bytes, *, network: bytes) -> ProfileSpec:
        """Decode and check what a decoder cannot express. Raises RemoteProtocolError."""
        spec = decode(cls, data, bytes_max=params.MESSAGE_BYTES_MAX)
        if spec.network != network:
            raise WrongNetwork(f"profile of network {spec.network.hex()[:12]}, this is {network.hex()[:12]}")
        TaskSpec.from_bytes(msgspec.msgpack.encode(spec.of), network=network)
        if spec.of.mode != "tolerant":
            raise MalformedRecord("a profile of an exact task", why="its work is compared bit for bit, by no threshold")
        return spec


def profile_root(sealed: bytes) -> bytes:
    """What the receipt of a profile names as its end state: the hash of the sealed Profile, 32 bytes."""
    return blake("ichiba/sealed-profile", sealed)


def profile_from(
    findings: Findings, spec: ProfileSpec, *, verifier: bytes, operations_per_second: int, now_ns: int
) -> Profile:
    """The record that a verifier signs. Raises MalformedRecord for findings that the rule cannot have given."""
    profile = Profile(
        network=spec.network,
        task=task_id(spec.of),
        verifier=verifier,
        mode="tolerant",
        segments=segments_of(spec.of),
        seeds=seeds_of(spec.of),
        measured=findings.measured,
        other_seed_ppb=findings.other_seed_ppb,
        gauges=findings.gauges,
        operations_per_second=operations_per_second,
        created_ns=now_ns,
    )
    check_profile(profile)
    return profile


def check_answer(profile: Profile, spec: ProfileSpec, *, verifier: bytes) -> None:
    """Raise VerificationFailed or MalformedRecord unless `profile` is what `spec` asked `verifier` for."""
    wanted = (task_id(spec.of), verifier, "tolerant", segments_of(spec.of), seeds_of(spec.of))
    if (profile.task, profile.verifier, profile.mode, profile.segments, profile.seeds) != wanted:
        raise VerificationFailed(
            "the profile is not what was ordered", why="its task, verifier, segments and seeds follow from the order"
        )
    check_profile(profile)
