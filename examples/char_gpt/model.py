"""A character GPT of a million parameters on the Python language reference. The model is in worker/char_gpt.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker.char_gpt import build, corpus

__all__ = ["build", "data"]


def data() -> dict[str, NDArray[np.generic]]:
    """The text as one array of ASCII codes: uint8 (characters,)."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
