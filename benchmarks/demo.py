"""How long the whole market takes for a training job, against the same steps in plain PyTorch.

Run `python benchmarks/demo.py [--steps N] [--cheat NAME | --kill]`. The demonstration (peer/demo.py) runs on five
real processes: start, capture, match, exact training in a sandbox, checks by two other peers, settlement, proof.
The baseline is eager float32 training of the same model, batches and schedule in this process, one thread, nobody
checking. The last line is JSON; seconds throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from peer.demo import Plan, run_demo
from peer.demo_story import Story
from protocol import philox
from protocol.program import BATCH_STREAM
from protocol.task import Schedule, learning_rate
from worker import char_gpt


class SilentScreen:
    """Notes when things were said, shows nothing."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def picture(self, story: Story) -> None:
        """How it stands."""

    def money(self, table: dict[str, Any], name_of: Callable[[str], str]) -> None:
        """The money table."""

    def text(self, title: str, body: str) -> None:
        """A longer text."""


def eager_seconds(steps: int, seed: int) -> tuple[float, float]:
    """Seconds of `steps` ordinary training steps, model and data in memory, and the last loss."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    training = char_gpt.build()
    text = torch.frombuffer(bytearray(char_gpt.corpus()), dtype=torch.uint8).to(torch.int64)
    schedule = Schedule("warmup-cosine", 2_000_000, 200_000, steps // 10)
    started = time.perf_counter()
    for step in range(steps):
        starts = philox.integers(seed, step, BATCH_STREAM, char_gpt.BATCH, len(text) - char_gpt.CONTEXT)
        places = torch.from_numpy(starts)[:, None] + torch.arange(char_gpt.CONTEXT)
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step=step, steps=steps) / 1e9
        loss = training.loss(training.model(text[places]), text[places + 1])
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
    return time.perf_counter() - started, loss.item()


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--cheat", default="")
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    plan = Plan(steps=options.steps, seed=options.seed, cheat=options.cheat, kill=options.kill)
    outcome = run_demo(plan, SilentScreen())
    assert not outcome.failures, outcome.failures
    eager_s, eager_loss = eager_seconds(options.steps, options.seed)
    print(f"whole market:  {outcome.seconds:6.1f} s")
    for part, seconds in outcome.parts.items():
        print(f"    {part:26} {seconds:6.1f} s")
    print(f"eager PyTorch: {eager_s:6.1f} s")
    figures = {
        "benchmark": "demo",
        "machine": {
            "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "load_before": round(load, 2),
        },
        **outcome.as_dict(),
        "schema": "ichiba.benchmark.demo/1",
        "eager_seconds": round(eager_s, 2),
        "eager_loss_last": round(eager_loss, 4),
        "ratio": round(outcome.seconds / eager_s, 2),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
