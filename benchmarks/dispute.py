"""What a dispute costs: bytes of its moves and of its opening, and the referee's time at the leaf.

Run `python benchmarks/dispute.py [--json]`. Two disputes are played in full, by torch on this machine: one about a
product in the demonstration model (1.07 million parameters, AdamW, four steps a segment), one about a product over
4096. In both the cheat adds wrongly from one term on and hides it, which is the deepest descent there is; the referee
stops at blocks of 512 and of 1. The leaf is timed as a notary runs it: from the opening's bytes to the result.

Transformers of 100 million and 7 billion parameters are computed, not played: capture does not trace on meta tensors,
and this machine does not hold their states. Capture gives the same nodes for each layer whatever the width, so the
number of nodes and of state tensors follows from two small captures of the same model with one and two layers; shapes
follow from the width. From these come the depths of all trees, and from the depths the bytes of each move, all paths
taken at their longest. Moves are counted for both sides. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from protocol import merkle, params
from protocol.blob import blob_id, manifest_of
from protocol.codec import encode
from protocol.dispute import SIDES, Game, Terms
from protocol.dispute_claim import MisaddingTracer
from protocol.dispute_player import Tracer, answer
from protocol.dispute_wire import Opening, OpenTensor, OpenTile, Partials, Revealed, TileShown
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, operations_per_step, program_id
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import char_gpt
from worker.capture import Training, capture_built
from worker.tracing import TorchTracer
from worker.training import initial_state

BLOCKS = (512, 1)
REPEATS = 20
STEPS = 100  # of a segment, where it is only computed


def task_of(program: Program, arrays: Mapping[str, NDArray[Any]], batch: BatchRule, steps: int) -> TaskSpec:
    """One segment of `steps` steps."""
    refs = []
    for name, array in arrays.items():
        data, size = array.tobytes(), params.BLOB_CHUNK_BYTES
        blob = blob_id(manifest_of(data[at : at + size] for at in range(0, len(data), size)))
        refs.append(ArrayRef(name, str(array.dtype), array.shape, blob, len(data)))  # type: ignore[arg-type]
    data = program.to_bytes()
    return TaskSpec(
        network=bytes(32),
        program=program_id(data),
        program_bytes=len(data),
        arrays=tuple(refs),
        batch=batch,
        initial=Initial("seed", bytes(32), bytes(32)),
        seed=7,
        steps=steps,
        steps_per_segment=steps,
        mode="exact",
        width=15,
        schedule=Schedule("constant", 10**6, 0, 0),
        operations_per_step=operations_per_step(program),
        name="dispute",
    )


# --- played ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Played:
    """One dispute: moves of both sides, and the referee's part."""

    rounds: int
    move_bytes: int
    opened_bytes: int
    leaf_ms: float
    seconds: float


def play(truth: Tracer, cheat: Tracer, in_root: bytes, block: int) -> Played:
    """The cheat claims, the other one challenges; the leaf is run REPEATS times, and the fastest counts."""
    facts = truth.facts
    ends = cheat.step_roots()[-1], truth.step_roots()[-1]
    terms = Terms(bytes(32), facts.task, facts.program, 0, in_root, *ends, block)
    game, players, moves = Game(terms), {"solver": cheat, "challenger": truth}, []
    started = time.perf_counter()
    while not game.wants_opening():
        number = game.number
        for side in SIDES:
            question = game.question(side)
            assert question is not None, "both sides owe a move"
            moves.append((side, number, answer(question, players[side]).body))
        for move in moves[-2:]:
            game.take(*move)
        assert game.result is None, f"the dispute ended before its leaf: {game.result}"
    question = game.question("challenger")
    assert question is not None, "an opening is wanted"
    opening = answer(question, truth).opening
    seconds = time.perf_counter() - started
    times = []
    for _ in range(REPEATS):
        referee = Game(terms)
        for move in moves:
            referee.take(*move)
        begun = time.perf_counter()
        referee.open(opening)
        times.append(time.perf_counter() - begun)
        assert referee.result is not None, "the opening proves"
        assert (referee.result.loser, referee.result.level) == ("solver", "block")
    sizes = sum(len(body) for _, _, body in moves)
    return Played(game.number, sizes, len(opening), 1e3 * min(times), seconds)


def played(program: Program, arrays: Mapping[str, NDArray[Any]], batch: BatchRule, steps: int) -> dict[int, Played]:
    """A dispute about the longest product of a program, for each size of block."""
    task = task_of(program, arrays, batch, steps)
    state = initial_state(task, program, None)
    raw = {name: array.tobytes() for name, array in arrays.items()}
    truth = TorchTracer(task, program, 0, arrays=raw, state=state)
    in_root = merkle.state_root({name: tensor.numpy() for name, tensor in state.items()})
    truth.step_roots()
    end = {name: tensor.numpy() for name, tensor in truth.state_before(steps).items()}
    last = max(update.value for update in program.updates)
    products = [
        value
        for value, node in enumerate(program.nodes, program.first_node)
        if node.op == "mm.default" and value < last
    ]
    value = max(products, key=lambda at: program.types[next(program.nodes[at - program.first_node].refs())].shape[-1])
    element = program.types[value].elements // 2
    chain = truth.facts.chain(value, element)
    assert chain is not None, "a product is a reduction"
    term = chain.terms // 2 + chain.terms // 5
    cheat = MisaddingTracer(truth, value=value, element=element, term=term, by=2**30, end=end)
    return {block: play(truth, cheat, in_root, block) for block in BLOCKS}


def demonstration() -> dict[int, Played]:
    """The demonstration model and its text."""
    program = capture_built(char_gpt.build).program
    text = np.frombuffer(char_gpt.corpus(), np.uint8)
    return played(program, {"text": text}, BatchRule("windows", char_gpt.BATCH, char_gpt.CONTEXT), 4)


def long_product(inner: int = 4096, side: int = 64) -> dict[int, Played]:
    """One product over `inner`, of a batch with a weight."""
    program, x = product_of(inner, side)
    return played(program, {"x": x}, BatchRule("sequence", side, 0), 1)


def product_of(inner: int, side: int) -> tuple[Program, NDArray[np.float32]]:
    """A program of one product over `inner`, and `side` rows of its batch."""
    drawn = Init.of("normal", 0.0, 1.0)
    zero = Init.of("constant", 0.0)
    program = Program(
        (
            Input("w", "parameter", "float32", (inner, side), drawn),
            Input("z", "buffer", "float32", (side, side), zero),
            Input("x", "batch", "float32", (side, inner), None),
        ),
        (),
        (
            Node("mm.default", (Ref(2), Ref(0)), "float32", (side, side), ""),
            Node("sum.dim_IntList", (Ref(3), Items((0, 1)), False), "float32", (), ""),
            Node("add.Tensor", (Ref(3), Ref(1)), "float32", (side, side), ""),
        ),
        (Update("w", 0), Update("z", 5)),
        4,
    )
    program.check()
    return program, np.random.default_rng(1).standard_normal((side, inner)).astype(np.float32)


# --- computed ----------------------------------------------------------------------------------------------
def transformer(layers: int, *, width: int = 16, symbols: int = 128, context: int = 16) -> Training:
    """The demonstration model in another size."""
    model = char_gpt.CharGPT(symbols=symbols, context=context, width=width, heads=2, layers=layers, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.zeros(2, context, dtype=torch.int64)
    return Training(model, char_gpt.loss, optimizer, {"x": x, "y": x.clone()})


def counts(layers: int) -> tuple[int, int]:
    """Nodes and state tensors of a transformer of so many layers, from captures of one and of two."""
    one, two = (capture_built(lambda n=n: transformer(n)).program for n in (1, 2))
    nodes = len(one.nodes) + (layers - 1) * (len(two.nodes) - len(one.nodes))
    return nodes, len(one.updates) + (layers - 1) * (len(two.updates) - len(one.updates))


def tree_bytes(leaves: int, *, path: int = 0, leaf: bool = False) -> tuple[int, int]:
    """Rounds, and bytes of one side's moves, of a descent in a tree of `leaves`. path: hashes shown at its top."""
    digest, height, rounds, size = bytes(32), merkle.tree_height(leaves), 0, 0
    while rounds == 0 or height > 0:
        below = max(0, height - 4)
        shown = (digest,) * min(leaves, 1 << (height - below))
        top = rounds == 0
        size += len(encode(Revealed(shown, (digest,) * path if top else (), digest if leaf and top else None)))
        rounds, height = rounds + 1, below
    return rounds, size


@dataclass(frozen=True)
class Computed:
    """A dispute that was not played."""

    parameters: int
    nodes: int
    tensors: int
    rounds: int
    move_bytes: int
    opened_bytes: int


def computed(*, width: int, layers: int, symbols: int, tokens: int, block: int) -> Computed:
    """The deepest dispute about the head's product, forward or backward, in a transformer of this size."""
    nodes, tensors = counts(layers)
    trace = nodes + 2
    found = []
    for rows, columns, inner in ((tokens, symbols, width), (symbols, width, tokens), (tokens, width, symbols)):
        tiles = merkle.tile_count((rows, columns), "float32")
        depth = merkle.tree_height
        parts = [
            tree_bytes(STEPS, path=depth(STEPS)),
            tree_bytes(tensors, path=depth(STEPS), leaf=True),
            tree_bytes(trace, path=depth(trace)),
            tree_bytes(tiles),
            (1, len(encode(TileShown(bytes(4096))))),
        ]
        left = 2 * inner
        while left > block:
            parts.append((1, len(encode(Partials(((-149, -149, 2**62),) * params.DISPUTE_ARITY)))))
            left = -(-left // params.DISPUTE_ARITY)
        read = min(block, left) // 32 + 1 if block > 1 else 1
        opened = 0
        operands = []
        for value, shape in enumerate(((rows, inner), (inner, columns))):
            path = (bytes(32),) * depth(merkle.tile_count(shape, "float32"))
            operands.extend(OpenTile(value, n, bytes(4096), path) for n in range(read))
        roots = tuple(OpenTensor(value, bytes(32), bytes(32), (bytes(32),) * depth(trace)) for value in range(2))
        opened = len(encode(Opening(roots, tuple(operands))))
        found.append((2 * sum(size for _, size in parts), sum(rounds for rounds, _ in parts), opened))
    moves, rounds, opened = (max(column) for column in zip(*found, strict=True))
    parameters = layers * 12 * width**2 + 2 * symbols * width
    return Computed(parameters, nodes, tensors, rounds, moves, opened)


LARGE = {
    "100M": {"width": 768, "layers": 12, "symbols": 10_000, "tokens": 8192},
    "7B": {"width": 4096, "layers": 32, "symbols": 32_000, "tokens": 8192},
}


def main() -> None:
    """Play, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    as_json = parser.parse_args().json
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name, make in (("1M", demonstration), ("product_4096", long_product)):
        for block, game in make().items():
            result[f"{name}_block_{block}"] = {**game.__dict__}
            if not as_json:
                print(
                    f"{name:>13}, block {block:>3}: {game.rounds} rounds, {game.move_bytes} bytes of moves, "
                    f"{game.opened_bytes} opened, leaf {game.leaf_ms:.2f} ms, {game.seconds:.1f} s to answer"
                )
    for name, size in LARGE.items():
        for block in BLOCKS:
            found = computed(**size, block=block)
            result[f"{name}_block_{block}"] = {**found.__dict__}
            if not as_json:
                print(
                    f"{name:>13}, block {block:>3}: {found.rounds} rounds, {found.move_bytes} bytes of moves, "
                    f"{found.opened_bytes} opened; {found.nodes} nodes, {found.tensors} state tensors (computed)"
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
