"""The demonstration model: a character GPT, in ordinary PyTorch, that learns the Python language reference.

About 1.07 million parameters, dropout, AdamW. The sizes are chosen so that a stranger's laptop core runs an exact
step in about a fifth of a second and the loss falls clearly within 200 steps. `build`, `corpus` and `generate`
run on the submitter's machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from worker.capture import Training

__all__ = ["BATCH", "CONTEXT", "SYMBOLS", "CharGPT", "build", "corpus", "generate"]

SYMBOLS = 128  # the ASCII codes; anything else is '?'
CONTEXT = 64
BATCH = 8
WIDTH = 168
HEADS = 6
LAYERS = 3
DROPOUT = 0.05


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        # No bias on the keys' projection: its true gradient is zero, so Adam would train noise (DESIGN §5.2).
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.before_feed = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """h: float32 (batch, time, width); the same shape comes back."""
        batch, time, width = h.shape
        qkv = self.query_key_value(self.before_attention(h))
        q, k, v = qkv.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, time, width)))
        return h + self.dropout(self.down(F.gelu(self.up(self.before_feed(h)))))


class CharGPT(nn.Module):
    """Symbols in, a score for each next symbol out."""

    def __init__(
        self,
        *,
        symbols: int = SYMBOLS,
        context: int = CONTEXT,
        width: int = WIDTH,
        heads: int = HEADS,
        layers: int = LAYERS,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # GPT-2's deviation, smaller where blocks add to the stream.
                adds = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (batch, time), each below `symbols`. Returns float32 (batch, time, symbols)."""
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats. scores: float32 (batch, time, symbols); target: int64 (batch, time)."""
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), target.reshape(-1))


def build() -> Training:
    """The whole training job but its data."""
    model = CharGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    example = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    return Training(model, loss, optimizer, {"x": example, "y": example.clone()})


def corpus() -> bytes:
    """The Python language reference as ASCII codes, about 460 kB; every Python has it in `pydoc_data.topics`."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return text.encode("ascii", errors="replace")


def generate(weights: Mapping[str, Tensor], prompt: str, length: int, seed: int) -> str:
    """`length` symbols that continue `prompt`, drawn from the model with these weights.

    weights: the state of a checkpoint, or the model's own state dict; optimizer tensors are ignored.
    """
    model = CharGPT(dropout=0.0)
    wanted = set(model.state_dict())
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted})
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    symbols = list(prompt.encode("ascii", errors="replace")) or [10]
    with torch.no_grad():
        for _ in range(length):
            x = torch.tensor([symbols[-CONTEXT:]])
            chances = torch.softmax(model(x)[0, -1] / 0.8, dim=-1)
            symbols.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(symbols).decode("ascii", errors="replace")
