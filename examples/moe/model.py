"""A mixture of experts in a small classifier: top-2 routing, the Switch Transformer's load-balancing loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training

BATCH, INPUTS, WIDTH, EXPERTS, TOP, KINDS = 32, 8, 24, 4, 2, 4


class Mixture(nn.Module):
    """Each row goes through its two best experts. Shazeer et al. 2017; balance: Fedus et al. 2021, equation 4."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)]
        )

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: float32 (rows, width). Returns the same shape, and the balance loss, a scalar."""
        chances = F.softmax(self.router(h), dim=-1)
        best, chosen = torch.topk(chances, TOP, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(chances).scatter(1, chosen, best)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out = out + weights[:, number : number + 1] * expert(h)
        share = F.one_hot(chosen[:, 0], EXPERTS).float().mean(dim=0)
        return out, EXPERTS * (share * chances.mean(dim=0)).sum()


class Network(nn.Module):
    """float32 (batch, 8) in; scores (batch, 4) and the balance loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mixture = nn.Linear(INPUTS, WIDTH), Mixture()
        self.norm, self.leave = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KINDS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: float32 (batch, inputs)."""
        h = self.enter(x)
        mixed, balance = self.mixture(self.norm(h))
        return self.leave(h + mixed), balance


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy, and a hundredth of the balance."""
    scores, balance = model(batch["x"])
    return F.cross_entropy(scores, batch["y"]) + 0.01 * balance


def build() -> Training:
    """Model, loss, optimizer and one example batch."""
    model = Network()
    example = {"x": torch.zeros(BATCH, INPUTS), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Training(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), example)


def data() -> dict[str, NDArray[np.generic]]:
    """2,000 points, the class by the signs of their first two coordinates: x float32 (2000, 8), y uint8."""
    x = np.random.default_rng(0).normal(size=(2000, INPUTS)).astype(np.float32)
    return {"x": x, "y": ((x[:, 0] > 0) * 2 + (x[:, 1] > 0)).astype(np.uint8)}
