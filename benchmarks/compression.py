"""What compressed borders cost: loss after equal steps, bytes on the wire, speed of the codecs. One JSON line last.

    python benchmarks/compression.py [--steps 400] [--seeds 5] [--svg docs/compression.svg]

loss: a character model of four stages (a block each, width 48, context 32) learns 64 windows of the Python language
reference by heart, in torch's own float32, batches of 8, learning rate falling to 0; each of the three borders sends
activations forward and gradients back by the codec named, both ends with memories of their own. The figure is the mean
loss of the last tenth of the steps; its ratio is to float32's with the same seed, so with the same weights at the start
and the same order of examples; the median of the seeds. `direct` is one scale a tensor and stochastic rounding, as
AQ-SGD (arXiv 2206.01299) compares itself with.
fewer_bytes: of both directions against float32, over the whole run; fewer_bytes_later: once every example was seen.
outer: two replicas train alone for 20 steps, then take an outer step (DiLoCo), by the codec of the deltas; half the
steps.
speed: processor time of one thread for 10 million normal values; median of 5.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from protocol.stage import Codec
from worker import char_gpt, compression
from worker.compression.compiled import has_tiles

STAGES, WIDTH, HEADS, CONTEXT = 4, 48, 4, 32
EXAMPLES, BATCH = 64, 8
RATE = 3e-3
INNER_STEPS, OUTER_RATE, OUTER_MOMENTUM = 20, 0.7, 0.9
VALUES = 10_000_000
RUNS: dict[str, tuple[Codec | int, Codec | int]] = {  # forward, backward; a number: direct, of so many bits
    "float32": (Codec("float32"), Codec("float32")),
    "AQ 4/8": (Codec("change", 4), Codec("tile", 8)),
    "AQ 2/4": (Codec("change", 2), Codec("tile", 4)),
    "direct 4/8": (4, 8),
    "direct 2/4": (2, 4),
}
OUTER = {"float32": Codec("float32"), "int4": Codec("tile", 4), "sparse": Codec("sparse", 2)}
COLOURS = {
    "float32": "#444444", "AQ 4/8": "#2a9d5c", "AQ 2/4": "#1d6fd0", "direct 4/8": "#d08a1d", "direct 2/4": "#c0392b",
}  # fmt: skip


def direct(x: Tensor, bits: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """x on 2**bits even levels between its largest magnitude and its negative, rounded at random; and its bytes."""
    most = 2**bits - 1
    scale = x.abs().max().clamp_min(1e-30) / most
    codes = ((x / scale + most) / 2 + torch.rand(x.shape, generator=generator)).floor_().clamp_(0, most)
    return (2 * codes - most) * scale, -(-x.numel() * bits // 8) + 4


@dataclass
class Border:
    """Between two stages: what crosses it, both ends' memories, the bytes of each step."""

    number: int
    forward: Codec | int
    backward: Codec | int
    seed: int
    ends: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    step: int = 0
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed * 1000 + self.number)
        self.ends = [
            (torch.zeros(EXAMPLES, CONTEXT, WIDTH), torch.zeros(EXAMPLES, dtype=torch.uint8)) for _ in range(2)
        ]

    def across(self, x: Tensor, codec: Codec | int, way: int) -> Tensor:
        """x as the other end has it. way: 0 forward, 1 backward."""
        if isinstance(codec, int):
            found, size = direct(x, codec, self.generator)
            self.sent_bytes[-1] += size
            return found
        place = {"seed": self.seed, "step": self.step, "stream": 2 * self.number + way}
        if codec.kind == "change":
            (kept, seen), (other_kept, other_seen) = self.ends
            payload = compression.encode_change(codec, x, kept=kept, seen=seen, rows=self.rows, **place)
            found = compression.decode_change(codec, payload, kept=other_kept, seen=other_seen, rows=self.rows, **place)
        else:
            payload = compression.encode(codec, x, **place)
            found = compression.decode(codec, payload, "float32", x.shape, **place)
        self.sent_bytes[-1] += len(payload)
        return found


class Crossed(torch.autograd.Function):
    """The border as an operation: activations one way, their gradients the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return border.across(x, border.forward, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.border.across(gradients[0], ctx.border.backward, 1), None


class Pipeline(nn.Module):
    """Four stages of a character model, with or without borders between them."""

    def __init__(self, borders: list[Border]) -> None:
        super().__init__()
        self.embed = nn.Embedding(char_gpt.SYMBOLS, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.stages = nn.ModuleList([char_gpt.Block(WIDTH, HEADS, 0.0) for _ in range(STAGES)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, char_gpt.SYMBOLS, bias=False)
        self.borders = borders

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (batch, context). Returns float32 (batch, context, symbols)."""
        h = self.embed(x) + self.place.weight
        for number, stage in enumerate(self.stages):
            h = stage(h)
            if number < len(self.borders):
                h = Crossed.apply(h, self.borders[number])
        return self.head(self.norm(h))


def examples() -> Tensor:
    """int64 (EXAMPLES, CONTEXT + 1): windows of the corpus, evenly spaced."""
    text = torch.frombuffer(bytearray(char_gpt.corpus()), dtype=torch.uint8).long()
    return text.unfold(0, CONTEXT + 1, (len(text) - CONTEXT - 1) // EXAMPLES)[:EXAMPLES].contiguous()


def order(seed: int, steps: int) -> list[list[int]]:
    """The examples of each step: all of them in a new order, epoch after epoch."""
    drawn = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // EXAMPLES)
    flat = np.concatenate([drawn.permutation(EXAMPLES) for _ in range(epochs)])
    return [flat[at * BATCH : (at + 1) * BATCH].tolist() for at in range(steps)]


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    """One step on `windows`, int64 (batch, CONTEXT + 1); its loss in nats."""
    loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Losses and bytes of each step of one run."""
    data = examples()
    torch.manual_seed(seed)
    borders = [] if name == "float32" else [Border(n, *RUNS[name], seed) for n in range(STAGES - 1)]
    model = Pipeline(borders)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step, rows in enumerate(order(seed, steps)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        for border in borders:
            border.step, border.rows = step, rows
            border.sent_bytes.append(0)
        losses.append(step_of(model, optimizer, data[rows]))
    whole = 2 * 4 * BATCH * CONTEXT * WIDTH * (STAGES - 1)
    sent = [sum(border.sent_bytes[step] for border in borders) or whole for step in range(steps)]
    later = sent[EXAMPLES // BATCH :] or sent
    return {
        "losses": losses,
        "last": statistics.fmean(losses[-max(1, steps // 10) :]),
        "fewer_bytes": whole * steps / sum(sent),
        "fewer_bytes_later": whole * len(later) / sum(later),
    }


def locally_trained(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Two replicas that train alone and meet every INNER_STEPS steps; the mean of their losses."""
    codec, data = OUTER[name], examples()
    torch.manual_seed(seed)
    shared = Pipeline([])
    start = [p.detach().clone() for p in shared.parameters()]
    momentum = [torch.zeros_like(p) for p in start]
    residual = [[torch.zeros_like(p) for p in start] for _ in range(2)]
    models = [shared, copy.deepcopy(shared)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01) for m in models]
    orders = [order(seed + 1000 * replica, steps) for replica in range(2)]
    losses, sent_bytes = [], 0
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        pairs_of = zip(models, optimizers, orders, strict=True)
        losses.append(statistics.fmean(step_of(model, one, data[rows[step]]) for model, one, rows in pairs_of))
        if (step + 1) % INNER_STEPS:
            continue
        pairs = [list(model.parameters()) for model in models]
        for index, before in enumerate(start):
            decoded = []
            for replica in range(2):
                payload, sent, residual[replica][index] = compression.encode_outer(
                    codec, pairs[replica][index].detach() - before, residual[replica][index],
                    seed=seed, step=step, stream=2 * index + replica,
                )  # fmt: skip
                sent_bytes += len(payload)
                decoded.append(sent)
            start[index], momentum[index] = compression.outer_step(
                before, compression.mean_of(decoded), momentum[index], OUTER_RATE, OUTER_MOMENTUM
            )
            for replica in range(2):
                pairs[replica][index].data.copy_(start[index])
    whole = 4 * sum(p.numel() for p in start) * 2 * (steps // INNER_STEPS)
    return {
        "losses": losses,
        "last": statistics.fmean(losses[-max(1, steps // 10) :]),
        "fewer_bytes": whole / sent_bytes,
    }


def compared(
    run: Callable[[str, int, int], dict[str, Any]], names: list[str], options: argparse.Namespace, steps: int
) -> dict[str, dict[str, Any]]:
    """Each run over all seeds: median last loss, median ratio to float32's, the figures of bytes, the median curve."""
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = {name: [pool.submit(run, name, seed, steps) for seed in range(options.seeds)] for name in names}
        for name in names:
            runs = [one.result() for one in begun[name]]
            each = [one["last"] for one in runs]
            base = found["float32"]["each"] if found else each
            ratios = [mine / other for mine, other in zip(each, base, strict=True)]
            found[name] = {
                "each": each,
                "last": statistics.median(each),
                "ratio": statistics.median(ratios),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "losses": [statistics.median(one["losses"][step] for one in runs) for step in range(steps)],
                **{key: runs[0][key] for key in runs[0] if key.startswith("fewer")},
            }
            if not options.json:
                print(f"{run.__name__} {name}: {found[name]['last']:.4f}, ratio {found[name]['ratio']:.3f}", flush=True)
    return found


def speeds() -> dict[str, dict[str, float]]:
    """Milliseconds of processor time to encode and to decode VALUES values, one thread."""
    torch.set_num_threads(1)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(VALUES, dtype=np.float32))
    found, place = {}, {"seed": 0, "step": 0, "stream": 0}
    for bits in (2, 3, 4, 6, 8):
        codec = Codec("tile", bits)
        found[f"tile {bits}"] = _timed(
            lambda codec=codec: compression.encode(codec, x, **place),
            lambda payload, codec=codec: compression.decode(codec, payload, "float32", x.shape, **place),
        )
    nothing = torch.zeros_like(x)
    for name, codec in OUTER.items():
        found[f"outer {name}"] = _timed(
            lambda codec=codec: compression.encode_outer(codec, x, nothing, **place)[0],
            lambda payload, codec=codec: compression.decode_outer(codec, payload, x.shape, **place),
        )
    return found


def _timed(encode: Callable[[], bytes], decode: Callable[[bytes], Tensor]) -> dict[str, float]:
    there, back = [], []
    for _ in range(5):
        start = time.process_time()
        payload = encode()
        middle = time.process_time()
        decode(payload)
        there.append(middle - start)
        back.append(time.process_time() - middle)
    return {
        "encode_ms": round(1e3 * statistics.median(there), 1),
        "decode_ms": round(1e3 * statistics.median(back), 1),
        "fewer_bytes": round(4 * VALUES / len(payload), 2),
    }


def drawn(runs: dict[str, dict[str, Any]], over: int) -> str:
    """The curves as an SVG picture, the loss on a scale of powers of two."""
    wide, high, left, top = 620, 320, 56, 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + left + 190}" height="{high + 90}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="24" font-size="14">Four stages, borders compressed: training loss '
        f"(means of {over} steps, median of the seeds)</text>",
    ]
    curves = {
        name: [statistics.fmean(run["losses"][at : at + over]) for at in range(0, len(run["losses"]), over)]
        for name, run in runs.items()
    }
    low = np.floor(np.log2(min(min(points) for points in curves.values())))
    most = np.ceil(np.log2(max(max(points) for points in curves.values())))
    for power in range(int(low), int(most) + 1):
        y = top + high * (most - power) / (most - low)
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}</text>')
    for row, (name, points) in enumerate(curves.items()):
        step = wide / max(1, len(points) - 1)
        path = " ".join(
            f"{left + i * step:.1f},{top + high * (most - np.log2(p)) / (most - low):.1f}" for i, p in enumerate(points)
        )
        dash = ' stroke-dasharray="5 4"' if name == "float32" else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.6"{dash}/>')
        words = f"{name}: {runs[name]['last']:.3f} ({runs[name]['ratio']:.2f}x)"
        parts.append(f'<text x="{left + wide + 12}" y="{top + 14 + 18 * row}" fill="{COLOURS[name]}">{words}</text>')
    steps = len(next(iter(runs.values()))["losses"])
    parts.append(f'<text x="{left}" y="{top + high + 20}">0</text>')
    parts.append(f'<text x="{left + wide}" y="{top + high + 20}" text-anchor="end">step {steps}</text>')
    return "\n".join([*parts, "</svg>\n"])


def told(run: dict[str, Any]) -> dict[str, Any]:
    """What the JSON line says of one run."""
    kept = {key: round(value, 4) for key, value in run.items() if key not in ("losses", "each", "ratios")}
    return {**kept, "ratios": run["ratios"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--svg", type=Path, help="draw the curves into this file")
    parser.add_argument("--processes", type=int, default=1, help="that train beside one another; moves no figure")
    parser.add_argument("--only", choices=["loss", "outer", "speed"], action="append", help="leave the rest out")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    if options.steps < 4 * INNER_STEPS:
        parser.error(f"at least {4 * INNER_STEPS} steps, or there are too few outer ones")
    torch.set_num_threads(1)
    only = options.only or ["loss", "outer", "speed"]
    results: dict[str, Any] = {}
    if "loss" in only:
        runs = compared(trained, list(RUNS), options, options.steps)
        results["loss"] = {name: told(run) for name, run in runs.items()}
        if options.svg:
            options.svg.write_text(drawn(runs, max(1, options.steps // 60)))
    if "outer" in only:
        runs = compared(locally_trained, list(OUTER), options, options.steps // 2)
        results["outer"] = {name: told(run) for name, run in runs.items()}
    if "speed" in only:
        results["speed"] = speeds()
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(
        json.dumps(
            {
                "benchmark": "compression",
                "machine": machine | {"load": os.getloadavg()[0], "compiled": has_tiles()},
                "steps": options.steps,
                "seeds": options.seeds,
                "baseline": "float32, the same weights at the start and the same examples",
                **results,
            }
        )
    )


if __name__ == "__main__":
    main()
