"""A vision transformer: patches by a convolution, a class token, nn.TransformerEncoderLayer, the optimizer Lion."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training
from worker.optimizers import Lion

BATCH, SIDE, PATCH, WIDTH, KINDS = 8, 12, 4, 32, 4


class ViT(nn.Module):
    """Dosovitskiy et al. 2020. float32 (batch, 1, 12, 12) in, float32 (batch, 4) out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 (batch, 1, 12, 12)."""
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1) + self.places
        return self.head(self.norm(self.encoder(h)[:, 0]))


def build() -> Training:
    """Model, loss, optimizer and one example batch."""
    model = ViT()
    example = {"x": torch.zeros(BATCH, 1, SIDE, SIDE), "y": torch.zeros(BATCH, dtype=torch.int64)}
    return Training(model, nn.CrossEntropyLoss(), Lion(model.parameters(), lr=1e-3, weight_decay=0.01), example)


def data() -> dict[str, NDArray[np.generic]]:
    """512 noisy pictures with one bright quarter: x float32 (512, 1, 12, 12), y uint8 which quarter."""
    rng = np.random.default_rng(0)
    pictures = rng.normal(0, 0.3, (512, 1, SIDE, SIDE)).astype(np.float32)
    kinds = rng.integers(0, KINDS, 512)
    half = SIDE // 2
    for picture, kind in zip(pictures[:, 0], kinds, strict=True):
        picture[(kind // 2) * half :, (kind % 2) * half :][:half, :half] += 1
    return {"x": pictures, "y": kinds.astype(np.uint8)}
