"""A convolutional network that tells drawn shapes apart: convolutions, batch norm, pools, SGD with momentum."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from worker.capture import Training

BATCH = 32
SIDE = 16
SHAPES = 4


def network() -> nn.Module:
    """float32 (batch, 1, 16, 16) in, float32 (batch, 4) out."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, SHAPES),
    )


def build() -> Training:
    """Model, loss, optimizer and one example batch: what `model = "model.py:build"` in job.toml names."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    example = {"x": torch.zeros(BATCH, 1, SIDE, SIDE), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Training(model, nn.functional.cross_entropy, optimizer, example)


def data() -> dict[str, NDArray[np.generic]]:
    """1,024 noisy pictures of a bar, a column, a square and a diagonal: x float32 (1024, 1, 16, 16), y uint8."""
    rng = np.random.default_rng(0)
    count = 1024
    pictures = rng.normal(0, 0.3, (count, 1, SIDE, SIDE)).astype(np.float32)
    kinds = rng.integers(0, SHAPES, count)
    for picture, kind, row, column in zip(
        pictures[:, 0], kinds, rng.integers(0, 9, count), rng.integers(0, 9, count), strict=True
    ):
        patch = picture[row : row + 8, column : column + 8]
        if kind == 0:
            patch[3:5, :] += 1
        elif kind == 1:
            patch[:, 3:5] += 1
        elif kind == 2:
            patch[2:6, 2:6] += 1
        else:
            patch[np.arange(8), np.arange(8)] += 2
    return {"x": pictures, "y": kinds.astype(np.uint8)}
