"""The ways in which the tensors of a run may travel, and what each would send: of a step that is cut and not yet coded.

Which way is taken is chosen by the links (market/run_choice.py), or, while nothing is known of them, as usual. What
job.toml says leaves one way. Sizes are those of the payloads, from codecs and shapes alone. Pure: no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from protocol import params
from protocol.errors import LocalProtocolError
from protocol.payload_size import payload_bytes
from protocol.run_sizes import Compress, RunChoice, RunSizes, Share
from protocol.stage import Codec, Flow
from worker.cut_plan import Cut, Sync
from worker.parallel_file import Parallel

__all__ = ["Choose", "RunOptions", "Travel"]

Choose = Callable[[RunSizes], RunChoice]
"""Who knows the links chooses."""

_RAW: Final = Codec("float32")
_COMPRESSIONS: Final = (
    Compress(0, 0),
    Compress(8, 8),
    Compress(4, 8),
    Compress(2, 4, automatic=False),  # ends above 1.06 times the loss of float32 (docs/decisions/0024)
)
_SHARES: Final = (
    Share("step", _RAW),
    Share("step", Codec("tile", 8)),
    Share("local", _RAW),
    Share("local", Codec("tile", 8)),
    Share("local", Codec("tile", 4)),
    Share("local", Codec("sparse", 2), automatic=False),  # nobody measured what it costs in loss
)
_USUAL: Final = (Compress(4, 8), Share("step", Codec("tile", 8)), Share("local", Codec("tile", 4)))


@dataclass(frozen=True)
class Travel:
    """How the tensors of a run travel. borders: the codecs forward and backward of each."""

    borders: tuple[tuple[Codec, Codec], ...]
    sync: Sync
    shared: Codec

    def at(self, stage: int) -> tuple[Codec, Codec | None, Codec, Codec | None]:
        """`forward`, `forward_in`, `backward` and `backward_in` of a Stage."""
        if not self.borders:
            return _RAW, None, _RAW, None
        behind, before = min(stage, len(self.borders) - 1), max(stage - 1, 0)
        (ahead, back_in), (ahead_in, back) = self.borders[behind], self.borders[before]
        return ahead, ahead_in if ahead_in != ahead else None, back, back_in if back_in != back else None


@dataclass(frozen=True)
class RunOptions:
    """Of one cut step. given: what job.toml says. examples: that there are; reads: rows that a replica reads in the
    whole job; kept: the stages that the submitter runs."""

    given: Parallel
    plan: Cut
    steps: int
    steps_per_segment: int
    examples: int
    reads: int
    kept: tuple[int, ...] = ()

    # --- what is open --------------------------------------------------------------------------------------
    @property
    def compressions(self) -> list[Compress]:
        """The least lossy first; none where there is one stage."""
        wanted = self.given.compress
        if self.plan.stages == 1:
            return []
        return list(_COMPRESSIONS) if wanted is None else [Compress(wanted.forward_bits, wanted.backward_bits)]

    @property
    def shares(self) -> list[Share]:
        """Likewise; none where there is one replica."""
        given = self.given
        if self.plan.replicas == 1:
            return []
        syncs = [sync for sync in ("step", "local") if given.sync in ("auto", sync)]
        if given.share is None:
            return [share for share in _SHARES if share.sync in syncs]
        if given.share.kind == "sparse":
            return [Share("local", given.share)]
        found = [("step", given.share), ("local", given.share)]
        return [Share(sync, codec) for sync, codec in found if sync in syncs]  # type: ignore[arg-type]

    def sizes(self) -> RunSizes:
        """What whoever chooses must know."""
        plan, count = self.plan, self.plan.places.micro_batches
        cuts = (0, *plan.cuts, len(plan.places.order))
        operations = [float(plan.places.operations[a:b].sum()) * count for a, b in itertools.pairwise(cuts)]
        ways, shares = self.compressions, self.shares
        stages = range(plan.stages if shares else 0)
        return RunSizes(
            replicas=plan.replicas,
            micro_batches=count,
            steps=self.steps,
            steps_per_segment=self.steps_per_segment,
            operations=[max(1, round(one)) for one in operations],
            compressions=ways,
            border_bytes=[[self._border_bytes(b, way) for way in ways] for b in range(plan.stages - 1)],
            shares=shares,
            shared_bytes=[[self._shared_bytes(stage, share) for share in shares] for stage in stages],
            usual_compression=next((i for i, way in enumerate(ways) if way in _USUAL), 0),
            usual_share=self._usual_share(shares),
            in_flight=self.given.in_flight or 0,
            kept=sorted(set(self.kept)),
        )

    @staticmethod
    def _usual_share(shares: list[Share]) -> int:
        """Replicas are strangers on links of home users: they train alone unless the job says otherwise."""
        local = [i for i, share in enumerate(shares) if share.sync == "local"]
        found = [i for i in local or range(len(shares)) if shares[i] in _USUAL]
        return (found or local or [0])[0]

    # --- what is taken -------------------------------------------------------------------------------------
    def kept_rows(self, compress: Compress) -> int:
        """The examples that are kept where activations travel so: where each is read twice at least, and what a stage
        keeps of them fits params.KEPT_BYTES_MAX."""
        keeps = self.given.compress is None or self.given.compress.keeps
        if not compress.forward_bits or not keeps or self.reads < 2 * self.examples:
            return 0
        size = max(self.examples * self.plan.example_bytes(stage) for stage in range(self.plan.stages))
        return self.examples if size <= params.KEPT_BYTES_MAX else 0

    def codecs(self, compress: Compress) -> tuple[Codec, Codec]:
        """Of what crosses a border forward and backward."""
        if not compress.forward_bits:
            return _RAW, _RAW
        kind = "change" if self.kept_rows(compress) else "tile"
        return Codec(kind, compress.forward_bits), Codec("tile", compress.backward_bits)  # type: ignore[arg-type]

    def travel(self, choice: RunChoice) -> Travel:
        """A choice in codecs. Raises LocalProtocolError for one that is not of these sizes."""
        ways, shares = self.compressions, self.shares
        borders, open_shares = self.plan.stages - 1, len(shares) or 1
        known = len(choice.compressions) == borders and all(0 <= way < len(ways) for way in choice.compressions)
        if not known or not 0 <= choice.share < open_shares:
            raise LocalProtocolError(f"{choice} of {borders} borders, {len(ways)} ways and {len(shares)} shares")
        found = tuple(self.codecs(ways[way]) for way in choice.compressions)
        if not shares:
            return Travel(found, "none", _RAW)
        share = shares[choice.share]
        return Travel(found, share.sync, share.codec)

    def plan_of(self, choice: RunChoice) -> Cut:
        """The plan for a choice: what it keeps of examples, and when its replicas meet."""
        travel = self.travel(choice)
        kept = frozenset(b for b, (ahead, _) in enumerate(travel.borders) if ahead.kind == "change")
        return replace(
            self.plan, sync=travel.sync, kept_rows=self.examples if kept else 0, kept_borders=kept if kept else None
        )

    # --- bytes ---------------------------------------------------------------------------------------------
    def _border_bytes(self, border: int, compress: Compress) -> tuple[int, int]:
        """What crosses it forward and backward in a step, on average over the job, first visits included."""
        ahead, back = self.codecs(compress)
        forward = sum(
            count * (self._visited(number, ahead) if rows else self._size(number, ahead, "forward"))
            for number, rows, count in self._crossing(self.plan.ahead[border])
        )
        backward = sum(
            count * self._size(number, back, "backward")
            for number, _, count in self._crossing(self.plan.back[border + 1])
        )
        return forward, backward

    def _crossing(self, crossings: tuple[tuple[int, bool], ...]) -> Iterator[tuple[int, bool, int]]:
        for number, rows in crossings:
            yield number, rows, self.plan.places.micro_batches if rows else 1

    def _visited(self, number: int, codec: Codec) -> int:
        """The bytes of a tensor of rows: rows are drawn, so of `reads` among `examples` so many are first visits."""
        if codec.kind != "change" or self.plan.example_of(number) is None:
            return self._size(number, codec, "forward")
        first = self.examples * -math.expm1(-self.reads / self.examples) / self.reads
        kind = self.plan.parts.program.types[number]
        rows = self.plan.parts.rows
        shape = (rows, kind.elements // rows)
        whole, change = (payload_bytes(codec, kind.dtype, shape, flow="forward", unseen=n) for n in (rows, 0))
        return round(first * whole + (1 - first) * change)

    def _size(self, number: int, codec: Codec, flow: Flow) -> int:
        kind = self.plan.parts.program.types[number]
        return payload_bytes(_RAW if codec.kind == "change" else codec, kind.dtype, kind.shape, flow=flow)

    def _shared_bytes(self, stage: int, share: Share) -> int:
        """What a replica of a stage sends each other one in an exchange."""
        plan, types = self.plan, self.plan.parts.program.types
        if share.sync == "step":
            numbers = [number for number, owner in plan.owner.items() if owner == stage]
            flow: Flow = "sync"
        else:
            numbers, flow = [number for number, home in plan.home.items() if home == stage], "outer"
        return sum(payload_bytes(share.codec, types[n].dtype, types[n].shape, flow=flow) for n in numbers)
