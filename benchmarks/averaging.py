"""How fast two peers average 10 million float32 parameters over the links of tensors, beside hivemind.

    python benchmarks/averaging.py [--json] [--rounds 5] [--values 10000000] [--hivemind PYTHON]

Two real processes on loopback, through Noise and the muxer as the daemon has them. Each sends the other its whole
vector in pieces of 1 MiB, as the flow `sync` does, and takes the mean; a round lasts from the moment both are told to
begin until both have all of it; processor seconds are of both peers together. `float32` sends values as they are,
`int8` by the codec tile of 8 bits, encoding included. --hivemind: the interpreter of an environment with hivemind
1.1.12 and numpy below 2.3, whose averager does the same between two processes in the same run, timed from the trigger
of its all-reduce (finding each other costs it seconds more, not counted). Rounds are interleaved; figures are medians,
in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trio
from numpy.typing import NDArray

from peer.host import HostConfig, open_host
from peer.tensor_links import PROTOCOL, Expected, Place, Seat, TensorLinks, TensorPort
from protocol.keys import SigningKey
from protocol.payload import PayloadKey
from protocol.stage import Codec
from worker import compression

PIECE = 1 << 18  # values of one payload: 1 MiB of float32
RUN = b"averaging".ljust(32)
SEEDS = (b"a" * 32, b"b" * 32)
CODECS = {"float32": Codec("float32"), "int8": Codec("tile", 8)}
HIVEMIND = Path(__file__).with_name("averaging_hivemind.py")


def accept_everything(topic: str, author: bytes, data: bytes) -> None:
    """No gossip is sent here."""


def place(unit: int, pieces: int) -> Place:
    """Unit 0 or 1 of two replicas."""
    places = frozenset(("sync", 0, index) for index in range(pieces))
    return Place(RUN, unit, 0, frozenset({1 - unit}), {1 - unit: Expected(places, 0, range(1 << 20))})


def encoded(codec: Codec, piece: torch.Tensor, step: int, index: int) -> bytes:
    """One payload."""
    return compression.encode(codec, piece, seed=1, step=step, stream=index)


def decoded(codec: Codec, payload: bytes, count: int, step: int, index: int) -> NDArray[np.float32]:
    """What a payload stands for."""
    if codec.kind == "float32":
        return np.frombuffer(payload, dtype="<f4", count=count)
    found = compression.decode(codec, payload, "float32", (count,), seed=1, step=step, stream=index)
    values: NDArray[np.float32] = found.numpy()
    return values


async def average(port: TensorPort, vector: torch.Tensor, codec: Codec, step: int) -> torch.Tensor:
    """The mean of both peers' vectors, as this one sees it."""
    me, other = port.place.unit, 1 - port.place.unit
    mean = torch.empty_like(vector)
    pieces, out, into = vector.split(PIECE), mean.split(PIECE), range(-(-len(vector) // PIECE))

    async def send() -> None:
        for index in into:
            payload = encoded(codec, pieces[index], step, index)
            await port.send(PayloadKey(step, "sync", 0, index, me), (other,), payload)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for index in into:
            payload = await port.want(PayloadKey(step, "sync", 0, index, other))
            theirs = decoded(codec, payload, len(out[index]), step, index)
            np.add(pieces[index].numpy(), theirs, out=out[index].numpy())
            out[index].mul_(0.5)
    return mean


async def peer_main(unit: int, values: int) -> None:
    """One of the two: read a codec, average, print the seconds; read a line, print how far off the mean is."""
    torch.set_num_threads(1)
    vector = torch.linspace(-1, 1, values) * (1 + unit)
    config = HostConfig(SEEDS[unit], ["/ip4/127.0.0.1/tcp/0"], (), False, "benchmark", accept_everything)
    with tempfile.TemporaryDirectory(prefix="ichiba-averaging-") as temporary:
        async with open_host(config) as host, trio.open_nursery() as nursery:
            links = TensorLinks(host, Path(temporary), nursery)
            host.serve(PROTOCOL, links.serve)
            print(host.addresses[0], flush=True)
            if address := (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
                await host.connect(address)
            seats = {1 - unit: Seat(SigningKey.from_seed(SEEDS[1 - unit]).public)}
            with links.open(place(unit, -(-values // PIECE)), seats) as port:
                step = 0
                while name := (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
                    begun, used = time.perf_counter(), time.process_time()
                    mean = await average(port, vector, CODECS[name], step)
                    seconds, processor = time.perf_counter() - begun, time.process_time() - used
                    print(json.dumps({"seconds": seconds, "processor": processor}), flush=True)
                    await trio.to_thread.run_sync(sys.stdin.readline)  # the other one may still be receiving
                    error = float((mean - torch.linspace(-1, 1, values) * 1.5).abs().max())
                    print(json.dumps({"error": error}), flush=True)
                    step += 1
                    port.release(step - 1)
            nursery.cancel_scope.cancel()


class Pair:
    """Two processes that are told to begin at once, a line each."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.processes = [
            subprocess.Popen(
                [*command, str(unit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )
            for unit in (0, 1)
        ]  # fmt: skip

    def say(self, unit: int, line: str) -> None:
        """A line to one of them."""
        stdin = self.processes[unit].stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def hear(self, unit: int) -> str:
        """A line of one of them. Raises RuntimeError if it is gone."""
        stdout = self.processes[unit].stdout
        assert stdout is not None
        if not (line := stdout.readline()):
            raise RuntimeError(f"process {unit} of {self.processes[unit].args!r} ended")
        return line.strip()

    def round(self, word: str) -> dict[str, float]:
        """The slower one's seconds, the larger error, and the processor seconds of both where they are told."""
        told: dict[str, list[float]] = {}
        for line in (word, "check"):
            for unit in (0, 1):
                self.say(unit, line)
            for unit in (0, 1):
                for name, value in json.loads(self.hear(unit)).items():
                    told.setdefault(name, []).append(value)
        return {name: sum(both) if name == "processor" else max(both) for name, both in told.items()}

    def end(self) -> None:
        """Kill both, and what they started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_hivemind(python: str, values: int) -> Pair:
    """hivemind's averager in two processes that know each other."""
    pair = Pair([python, str(HIVEMIND), str(values)], {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    pair.say(0, "")
    pair.say(1, pair.hear(0))
    pair.hear(1)
    return pair


def measure(values: int, rounds: int, hivemind: str) -> dict[str, Any]:
    """The figures of one run."""
    ours = Pair([sys.executable, __file__, "--values", str(values), "--unit"], dict(os.environ))
    theirs = start_hivemind(hivemind, values) if hivemind else None
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    try:
        first = ours.hear(0)
        ours.hear(1)
        ours.say(1, first)
        ours.say(0, "")
        for number in range(rounds + 1):
            for name in ("float32", "int8", *(("hivemind",) if theirs else ())):
                told = (theirs if name == "hivemind" and theirs else ours).round(name)
                if number:  # the first one connects and warms up
                    seconds.setdefault(name, []).append(told["seconds"])
                    processor.setdefault(name, []).append(told.get("processor", 0.0))
                    errors[name] = max(errors.get(name, 0.0), told["error"])
                    print(f"round {number}: {name} {told['seconds']:.3f} s", file=sys.stderr)
    finally:
        ours.end()
        if theirs is not None:
            theirs.end()
    medians = {name: round(statistics.median(all_), 4) for name, all_ in seconds.items()}
    beside = [name for name in CODECS if theirs is not None]
    ratios = {f"{name}_over_hivemind": round(medians[name] / medians["hivemind"], 3) for name in beside}
    return {
        "schema": "ichiba/benchmark/averaging/1",
        "averaging_float32_s": medians["float32"],
        "averaging_int8_s": medians["int8"],
        "hivemind_s": medians.get("hivemind"),
        **ratios,
        **{f"{name}_processor_s": round(statistics.median(processor[name]), 4) for name in CODECS},
        "all_s": {name: [round(one, 4) for one in all_] for name, all_ in seconds.items()},
        "error_max": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "values": values,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Run the benchmark, or one of its peers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hivemind", default="", help="the interpreter of an environment that has hivemind 1.1.12")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--unit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.unit is not None:
        trio.run(peer_main, arguments.unit, arguments.values)
        return
    figures = measure(arguments.values, arguments.rounds, arguments.hivemind)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
