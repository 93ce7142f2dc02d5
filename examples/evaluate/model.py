"""An evaluation of the spirals classifier (examples/mlp): mean loss and accuracy over its 2,000 points, each read once.

Its weights come from a training job: `ichiba job get JOB -o trained`, then `initial = "trained/weights.safetensors"` in
job.toml, and afterwards `ichiba job proof evaluated trained`. As it stands here the weights are drawn from the seed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ichiba import Evaluation

BATCH = 64  # the last batch has 16 rows; so loss and metrics give one value a row


class Spirals(nn.Module):
    """The model of examples/mlp, under the same names: float32 (batch, 2) in, scores (batch, 2) out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 (batch, 2)."""
        return self.layers(x)


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """For each row, whether its best score is the target's: the mean over all is the share of right ones."""
    return scores.argmax(dim=1) == target


def build() -> Evaluation:
    """Model, loss, one example batch, and the metrics by name."""
    example = {"x": torch.zeros(BATCH, 2), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Evaluation(Spirals(), nn.CrossEntropyLoss(reduction="none"), example, {"accuracy": accuracy})


def data() -> dict[str, NDArray[np.generic]]:
    """2,000 points on two arms of one turn: x float32 (2000, 2), y uint8 (2000,)."""
    rng = np.random.default_rng(0)
    arm = np.arange(2000) % 2
    along = rng.uniform(0.1, 1.0, 2000)
    angle = 2 * np.pi * along + np.pi * arm
    points = along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return {"x": points.astype(np.float32), "y": arm.astype(np.uint8)}
