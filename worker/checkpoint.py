"""A state of tensors as bytes and as a root: what a solver stores at each checkpoint. DESIGN §5.3, §5.4.

The bytes are canonical safetensors, never a pickle; the root is over 32 x 32 tiles (protocol/merkle.py). Equal
states give equal bytes and equal roots on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protocol import merkle, safetensors
from protocol.safetensors import Layout

__all__ = ["Roots", "dump", "layout_of", "load", "state_root"]


def dump(state: Mapping[str, Tensor]) -> bytes:
    """`state` as one safetensors file. Raises LocalProtocolError for a dtype that no state may have."""
    return safetensors.write({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})


def load(data: bytes | bytearray | memoryview, layout: Layout | None = None) -> dict[str, Tensor]:
    """The tensors of a file made by `dump`, in memory of their own.

    layout: what the file must hold, no more and no less. Raises MalformedRecord or LimitExceeded for anything
    else, before any tensor is made.
    """
    return {name: torch.from_numpy(array.copy()) for name, array in safetensors.parse(data, layout).items()}


def layout_of(state: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout that `load` checks a file of such a state against."""
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}


def state_root(state: Mapping[str, Tensor]) -> bytes:
    """The root that binds every bit of `state`: 32 bytes."""
    return merkle.state_root({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})


class Roots:
    """Roots of the states of one run: a tensor that steps hand on untouched, as frozen weights are, is hashed once.

    It is known again by being the same object under the same name; nothing of ours changes a tensor in place.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, bytes]] = {}

    def of(self, state: Mapping[str, Tensor]) -> bytes:
        """The root of `state`: 32 bytes. Keeps its tensors alive until the next call."""
        found: dict[str, tuple[Tensor, bytes]] = {}
        for name, tensor in state.items():
            known = self._known.get(name)
            if known is None or known[0] is not tensor:
                known = (tensor, merkle.tensor_root(tensor.detach().cpu().numpy()))
            found[name] = known
        self._known = found
        return merkle.state_root_of({name: root for name, (_, root) in found.items()})
