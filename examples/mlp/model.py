"""A small classifier of two interleaved spirals: ordinary PyTorch, nothing of the market's but `Training`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from worker.capture import Training

BATCH = 32


class Spirals(nn.Module):
    """Points of the plane in, scores of the two arms out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 (batch, 2). Returns float32 (batch, 2)."""
        return self.layers(x)


def build() -> Training:
    """Model, loss, optimizer and one example batch: what `model = "model.py:build"` in job.toml names."""
    model = Spirals()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    example = {"x": torch.zeros(BATCH, 2), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Training(model, nn.CrossEntropyLoss(), optimizer, example)


def data() -> dict[str, NDArray[np.generic]]:
    """2,000 points on two arms of one turn: x float32 (2000, 2), y uint8 (2000,)."""
    rng = np.random.default_rng(0)
    arm = np.arange(2000) % 2
    along = rng.uniform(0.1, 1.0, 2000)
    angle = 2 * np.pi * along + np.pi * arm
    points = along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    noisy = points + rng.normal(0, 0.01, points.shape)
    return {"x": noisy.astype(np.float32), "y": arm.astype(np.uint8)}
