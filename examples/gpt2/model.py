"""A GPT-2 style language model: learned positions, dropout, GELU, a head tied to the embedding, AdamW, clipping."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training
from worker.char_gpt import corpus

BATCH, CONTEXT, SYMBOLS, WIDTH, HEADS, LAYERS, DROPOUT = 4, 16, 128, 32, 4, 2, 0.1


class Block(nn.Module):
    """Attention, then a feed-forward layer (Radford et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, h: Tensor) -> Tensor:
        """h: float32 (batch, time, width)."""
        batch, time, width = h.shape
        q, k, v = (
            part.view(batch, time, HEADS, width // HEADS).transpose(1, 2)
            for part in self.attn(self.ln_1(h)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if self.training else 0.0, is_causal=True)
        h = h + self.drop(self.proj(mixed.transpose(1, 2).contiguous().view(batch, time, width)))
        return h + self.drop(self.out(F.gelu(self.fc(self.ln_2(h)), approximate="tanh")))


class GPT2(nn.Module):
    """Symbols in, a score for each next symbol out."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (batch, time). Returns float32 (batch, time, symbols)."""
        h = self.drop(self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            h = block(h)
        return self.lm_head(self.ln_f(h))


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats. scores: float32 (batch, time, symbols); target: int64 (batch, time)."""
    return F.cross_entropy(scores.view(-1, scores.size(-1)), target.view(-1), ignore_index=-1)


def build() -> Training:
    """Model, loss, optimizer and one example batch; gradients are clipped."""
    model = GPT2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    example = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    return Training(model, loss, optimizer, {"x": example, "y": example.clone()}, clip_norm=1.0)


def data() -> dict[str, NDArray[np.generic]]:
    """The Python language reference as ASCII codes: uint8 (characters,)."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
