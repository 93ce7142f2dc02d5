"""A Llama style language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, AdamW."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.capture import Training
from worker.char_gpt import corpus

BATCH, CONTEXT, SYMBOLS, WIDTH, HEADS, GROUPS, HIDDEN, LAYERS = 4, 16, 128, 32, 4, 2, 88, 2
SIZE = WIDTH // HEADS


def rotary(time: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of each position: float32 (time, SIZE). Su et al. 2021.

    Called within the step, so that the tables are part of the graph and of its exact arithmetic: as buffers they would
    hold whatever this machine's cosine gives, and the job could not start from a seed.
    """
    rates = torch.exp(torch.arange(0, SIZE, 2).float() * (-math.log(10000.0) / SIZE))
    angles = torch.outer(torch.arange(time).float(), rates)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: float32 (batch, heads, time, SIZE), each pair of halves rotated by its position's angle."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Block(nn.Module):
    """Touvron et al. 2023; grouped queries: Ainslie et al. 2023."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.wq = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.wk = nn.Linear(WIDTH, GROUPS * SIZE, bias=False)
        self.wv = nn.Linear(WIDTH, GROUPS * SIZE, bias=False)
        self.wo = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """h: float32 (batch, time, width)."""
        batch, time, width = h.shape
        normed = self.attention_norm(h)
        q = self.wq(normed).view(batch, time, HEADS, SIZE).transpose(1, 2)
        k = self.wk(normed).view(batch, time, GROUPS, SIZE).transpose(1, 2)
        v = self.wv(normed).view(batch, time, GROUPS, SIZE).transpose(1, 2)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = h + self.wo(mixed.transpose(1, 2).reshape(batch, time, width))
        normed = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(normed)) * self.w3(normed))


class Llama(nn.Module):
    """Symbols in, a score for each next symbol out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.output = nn.Linear(WIDTH, SYMBOLS, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (batch, time). Returns float32 (batch, time, symbols)."""
        h = self.embed(x)
        cos, sin = rotary(x.shape[1])
        for block in self.blocks:
            h = block(h, cos, sin)
        return self.output(self.norm(h))


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats. scores: float32 (batch, time, symbols); target: int64 (batch, time)."""
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def build() -> Training:
    """Model, loss, optimizer and one example batch."""
    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    example = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    return Training(model, loss, optimizer, {"x": example, "y": example.clone()}, clip_norm=1.0)


def data() -> dict[str, NDArray[np.generic]]:
    """The Python language reference as ASCII codes: uint8 (characters,)."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
