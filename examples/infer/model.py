"""Batch inference: the scores of 300 drawn pictures, in their order, as result.safetensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ichiba import Inference

BATCH, ROWS = 20, 300


def build() -> Inference:
    """A small convolutional network; its weights are drawn, or come from a job (see examples/evaluate)."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    return Inference(model, {"x": torch.zeros(BATCH, 1, 8, 8)}, ROWS)


def data() -> dict[str, NDArray[np.generic]]:
    """x float32 (300, 1, 8, 8)."""
    return {"x": np.random.default_rng(0).normal(size=(ROWS, 1, 8, 8)).astype(np.float32)}
