"""A small residual network on drawn shapes: convolutions, batch norm, residual blocks, a stride, average pooling."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training

BATCH, SIDE, KINDS = 16, 12, 4


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 (batch, inputs, height, width)."""
        h = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def network() -> nn.Module:
    """float32 (batch, 1, 12, 12) in, float32 (batch, 4) out."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(8, 8, 1),
        Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, KINDS),
    )


def build() -> Training:
    """Model, loss, optimizer and one example batch: what `model = "model.py:build"` in job.toml names."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    example = {"x": torch.zeros(BATCH, 1, SIDE, SIDE), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Training(model, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer, example)


def data() -> dict[str, NDArray[np.generic]]:
    """512 noisy pictures with one bright quarter: x float32 (512, 1, 12, 12), y uint8 which quarter."""
    rng = np.random.default_rng(0)
    pictures = rng.normal(0, 0.3, (512, 1, SIDE, SIDE)).astype(np.float32)
    kinds = rng.integers(0, KINDS, 512)
    half = SIDE // 2
    for picture, kind in zip(pictures[:, 0], kinds, strict=True):
        picture[(kind // 2) * half :, (kind % 2) * half :][:half, :half] += 1
    return {"x": pictures, "y": kinds.astype(np.uint8)}
