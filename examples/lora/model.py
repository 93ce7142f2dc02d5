"""A LoRA fine-tune: the base model is frozen, two small matrices beside each layer are trained. Mean squared error.

The base is part of the state and passes through each step unchanged, so a checker sees that nobody touched it. To
start from weights of your own, write initial = "weights.safetensors" in job.toml.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training

BATCH, INPUTS, WIDTH, RANK = 16, 8, 48, 4


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank change of it. Hu et al. 2021."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 (batch, inputs)."""
        return self.base(x) + (x @ self.down.T @ self.up.T) * self.scale


def network() -> nn.Module:
    """float32 (batch, 8) in, float32 (batch, 1) out: the base with its layers wrapped."""
    base = [nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    first, second, last = (LoRA(layer, RANK) for layer in base)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


def build() -> Training:
    """Only what still wants a gradient goes to the optimizer; each update is made of two micro-batches."""
    model = network()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    example = {"x": torch.zeros(BATCH, INPUTS), "y": torch.zeros(BATCH, 1)}
    return Training(model, nn.MSELoss(), torch.optim.AdamW(trained, lr=1e-2), example, accumulate=2)


def data() -> dict[str, NDArray[np.generic]]:
    """2,000 points of a curved surface: x float32 (2000, 8), y float32 (2000, 1)."""
    x = np.random.default_rng(0).normal(size=(2000, INPUTS)).astype(np.float32)
    return {"x": x, "y": (np.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]).astype(np.float32)}
