"""A recurrent network (nn.LSTM) that learns whether a series adds up to more than nothing: binary cross entropy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training

BATCH, TIME, WIDTH = 16, 8, 24


class Counter(nn.Module):
    """float32 (batch, time, 2) in, one score (batch,) out."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 (batch, time, 2)."""
        out, _ = self.recurrent(x)
        return self.head(out[:, -1]).squeeze(-1)


def build() -> Training:
    """Model, loss, optimizer and one example batch: what `model = "model.py:build"` in job.toml names."""
    model = Counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    example = {"x": torch.zeros(BATCH, TIME, 2), "y": torch.zeros(BATCH)}
    return Training(model, nn.BCEWithLogitsLoss(), optimizer, example, clip_value=0.5)


def data() -> dict[str, NDArray[np.generic]]:
    """2,000 series: x float32 (2000, 8, 2), y float32 1 where the first channel's sum is positive."""
    series = np.random.default_rng(0).normal(size=(2000, TIME, 2)).astype(np.float32)
    return {"x": series, "y": (series[:, :, 0].sum(1) > 0).astype(np.float32)}
