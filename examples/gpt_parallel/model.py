"""A character GPT of 5 million parameters on the Python language reference, trained by four peers.

Two stages by two replicas: see [parallel] in job.toml. The model is in worker/char_gpt.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from worker.capture import Training
from worker.char_gpt import CharGPT, corpus, loss

__all__ = ["build", "data"]

ROWS, LENGTH = 2, 64  # of one micro-batch


def build() -> Training:
    """Model, loss, optimizer, and one micro-batch."""
    model = CharGPT(context=LENGTH, width=272, heads=8, layers=6, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    example = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    return Training(model, loss, optimizer, {"x": example, "y": example.clone()})


def data() -> dict[str, NDArray[np.generic]]:
    """The text as one array of ASCII codes: uint8 (characters,)."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
