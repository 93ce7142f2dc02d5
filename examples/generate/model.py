"""Text from the demonstration's character GPT: seeded sampling, the same text on every machine.

With weights of a training job of examples/char_gpt (`initial = "trained/weights.safetensors"` in job.toml) it writes as
well as that job learnt; as it stands here the weights are drawn from the seed.
"""

from __future__ import annotations

import torch

from ichiba import Generation
from worker.char_gpt import CONTEXT, CharGPT

TOKENS = 60  # more than the model's 64 places hold with the prompt: the oldest are left out


def build() -> Generation:
    """Two continuations of one prompt, among the eight likeliest symbols each time."""
    prompt = torch.tensor([list(b"The statement ")] * 2)
    return Generation(CharGPT(), prompt, TOKENS, temperature=0.8, top_k=8, context=CONTEXT)
