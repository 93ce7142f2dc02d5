"""Stacked proofs: that a job started from the state another job ended in. DESIGN §4, §5.4.

Nothing has to be declared, for the roots say it. The later task names the root of its first state. The earlier proof
gives the root of each tensor it ended with. What the two share by name must be the same tensors, and the rest of the
first state (a fresh optimizer, empty results, adapters beside a frozen base) follows from the later Program's init
rules and the later task's seed; so the first state's root can be computed from the earlier proof alone, and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol import merkle, params
from protocol.bundle import BundleReport
from protocol.bundle_deal import Refused
from protocol.program import Input, Program, program_id, state_layout

__all__ = ["Draw", "verify_stack"]

Draw: TypeAlias = Callable[[Input, int, int], NDArray[Any]]
"""A state tensor by its init rule, from the task's seed and its number in the order of names (DESIGN §4)."""


def verify_stack(later: BundleReport, program: bytes, earlier: BundleReport, draw: Draw | None = None) -> int:
    """Raise VerificationFailed unless `later` started from the state `earlier` ended in; how many tensors it took over.

    program: the canonical bytes of `later`'s Program. Weights are taken over, everything else starts afresh; or the
    whole state is, when one job goes on with another's. Weights the earlier job had not are drawn anew by `draw`;
    without it only constants are known. Raises MalformedRecord for bytes that are no Program.
    """
    if program_id(program) != later.program:
        raise Refused("program", f"the program given is not the one job {later.job.hex()[:12]} ran")
    if not earlier.complete or not earlier.state:
        raise Refused("base", f"job {earlier.job.hex()[:12]} is not proved to its end, with the roots of its tensors")
    graph = Program.from_bytes(program)
    if later.base_root == earlier.final_root:
        return len(earlier.state)
    rules = {item.name: item for item in graph.inputs if item.init is not None}
    weights = {item.name for item in graph.inputs_of("parameter", "buffer")}
    taken = {name: earlier.state[name] for name in weights & earlier.state.keys()}
    unknown = sorted(weights - taken.keys()) if not taken else []
    unknown = unknown or sorted(name for name in weights - taken.keys() if _kind(rules[name]) == "given")
    if unknown:
        raise Refused("base", f"job {earlier.job.hex()[:12]} ended without {unknown[0][:80]!r}, which the later has")
    size = sum(rules[name].type.size_bytes for name in rules.keys() - taken.keys())
    if size > params.BLOB_BYTES_MAX:
        raise Refused("base", f"{size} bytes of the first state are not the earlier job's: no checkpoint is so large")
    fresh = {
        name: merkle.tensor_root(_fresh(rules[name], later.seed, number, draw))
        for number, name in enumerate(state_layout(graph))
        if name not in taken
    }
    found = merkle.state_root_of({**taken, **fresh})
    if found != later.base_root:
        raise Refused(
            "base",
            f"job {later.job.hex()[:12]} started from state {later.base_root.hex()[:12]}; with the weights job "
            f"{earlier.job.hex()[:12]} ended in it would be {found.hex()[:12]}",
        )
    return len(taken)


def _kind(item: Input) -> str:
    return item.init.kind if item.init is not None else "given"


def _fresh(item: Input, seed: int, number: int, draw: Draw | None) -> NDArray[Any]:
    """The value that the rule of a tensor gives. Raises VerificationFailed for one that nobody here can draw."""
    init = item.init
    if init is not None and init.kind == "constant":
        return np.full(item.shape, init.a, dtype=item.dtype)
    if draw is None or _kind(item) == "given":
        raise Refused("base", f"{item.name[:80]!r} is neither a weight nor a constant: its start cannot be derived")
    return draw(item, seed, number)
