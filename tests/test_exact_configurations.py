"""One machine, many arithmetics: threads, instruction sets and libraries must not move a bit of the exact kernels.

Each configuration is a process of its own, because torch, MKL and oneDNN choose their code when they start. Run as a
script, this file computes the digests that the test compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protocol.program import Program
from worker import checkpoint

ROOT = Path(__file__).resolve().parent.parent
STEPS = 100


@dataclass(frozen=True)
class Configuration:
    """capability: ATEN_CPU_CAPABILITY; dnn: ONEDNN_MAX_CPU_ISA; mkl: MKL_CBWR, whose code paths give native products
    other bits (measured), as capability does with fused kernels and threads with large sums. backend: of products;
    without `helper` nothing compiled of ours takes part."""

    threads: int
    capability: str
    backend: str
    dnn: str = ""
    mkl: str = ""
    helper: bool = True

    def __str__(self) -> str:
        helper = "" if self.helper else "plain"
        return "-".join(filter(None, (self.capability, str(self.threads), self.backend, self.dnn, self.mkl, helper)))


REFERENCE = Configuration(1, "default", "float64", "SSE41", "COMPATIBLE", helper=False)
OTHERS = [
    Configuration(2, "default", "auto", "AVX2"),
    Configuration(2, "avx2", "float64", "AVX2", "AVX2"),
    Configuration(1, "avx2", "int8", helper=False),
    Configuration(1, "avx512", "int8"),
    Configuration(2, "avx512", "auto"),
]


def compute(backend: str, helper: bool, program: Program, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """The digest of each kernel's results and of a training run of `program` from `state`, in this process."""
    from worker import exact, executor

    if backend == "int8" and not exact.int8_is_exact():
        backend = "auto"
    digests = {}

    def record(name: str, *results: torch.Tensor) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for result in results:
            values = result.contiguous()
            if values.is_floating_point():
                values = torch.where(values.isnan(), torch.nan, values).view(torch.int32)
            digest.update(values.numpy().tobytes())
        digests[name] = digest.hexdigest()

    patterns = torch.arange(-(2**31), 2**31, 40_009, dtype=torch.int64).to(torch.int32)  # every exponent and sign
    wild = patterns.view(torch.float32)
    tame = exact.normal(1, 0, 0, (800, 170))
    kernels = exact.kernels(15, backend, helper=helper)
    for name in ("neg", "abs", "sqrt", "reciprocal", "sign", "exp", "log", "erf", "tanh", "sin", "cos"):
        kernel = kernels[f"{name}.default"]
        record(name, kernel(wild), kernel(tame), kernel(tame.t()))
    flipped = wild.flip(0)
    for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"):
        kernel = kernels[f"{name}.Tensor"]
        record(name, kernel(wild, flipped), kernel(wild, wild[7]), kernel(tame, 0.1), kernel(tame, tame[0]))
    for name in ("maximum", "minimum"):
        kernel = kernels[f"{name}.default"]
        zeros = torch.zeros(99)
        record(name, kernel(wild, flipped), kernel(wild, -zeros[0]), kernel(zeros, -zeros), kernel(-zeros, zeros))
    record("to", kernels["to.dtype"](wild, torch.int64), kernels["to.dtype"](patterns.long() * 2**31, torch.float32))
    for dims in ([0], [1], [0, 1]):
        record(f"sum {dims}", *(kernels["sum.dim_IntList"](x, dims, False) for x in (tame, tame.t(), tame * 1e-41)))
        record(f"amax {dims}", *(kernels["amax.default"](x, dims, True) for x in (tame, tame.t(), -0.0 * tame)))
    index = (exact.uniform(2, 0, 0, (800,)) * 9).long()
    record("embedding", kernels["embedding_dense_backward.default"](tame, index, 9, -1, False))
    record("uniform", kernels["ichiba.uniform"](torch.tensor([5, 6]), 7, [1000]))
    other = exact.normal(1, 0, 1, (170, 200))
    rows = torch.cat([tame * 1e-30, tame[:3] * 1e38, wild[: 170 * 200].reshape(200, 170)])
    for width in (8, 15, 22):
        mm, bmm = (exact.kernels(width, backend, helper=helper)[name] for name in ("mm.default", "bmm.default"))
        record(f"mm {width}", mm(tame, other), mm(tame.t(), tame), mm(rows, other), mm(other.t(), tame.t()))
        record(f"bmm {width}", bmm(tame.reshape(5, 160, 170), other.expand(5, 170, 200)))

    batch = torch.arange(32).reshape(4, 8).remainder(16)
    run = executor.Executor(program, "exact", threads=torch.get_num_threads(), backend=backend, helper=helper)
    for step in range(STEPS):
        y = (exact.uniform(3, step, 0, (4, 8)) * 16).long()
        state, value = run.step(state, {"x": batch, "y": y}, 3e-3, 11, step)
        if step in (0, 14, STEPS - 1):
            digests[f"training step {step}"] = checkpoint.state_root(state).hex()
    assert value < 4.0
    return digests


def environment(configuration: Configuration) -> dict[str, str]:
    """The variables of a process that computes so."""
    threads = str(configuration.threads)
    return {
        **os.environ,
        "ATEN_CPU_CAPABILITY": configuration.capability,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "ONEDNN_MAX_CPU_ISA": configuration.dnn or "ALL",
        "MKL_CBWR": configuration.mkl or "AUTO",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def start(configuration: Configuration, folder: Path) -> subprocess.Popen[str]:
    options = [configuration.backend, str(configuration.threads), str(int(configuration.helper)), str(folder)]
    command = [sys.executable, __file__, *options]
    return subprocess.Popen(command, env=environment(configuration), cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, dict[str, str]]:
    out, _ = process.communicate(timeout=900)  # a hang: it takes 10 s on an idle core
    assert process.returncode == 0
    found: dict[str, dict[str, str]] = json.loads(out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Program and the first state that every configuration trains from, as a submitter gives them to all."""
    from worker import exact
    from worker.capture import Captured, capture
    from worker.char_gpt import CharGPT, loss

    model = CharGPT(symbols=16, context=8, width=16, heads=2, layers=1, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.arange(32).reshape(4, 8).remainder(16)
    captured = capture(model, loss, optimizer, {"x": batch, "y": batch.roll(-1, 1)})
    # torch draws other weights under other instruction sets, so they come from our generator.
    state = dict(captured.initial_state)
    for stream, (name, parameter) in enumerate(model.named_parameters()):
        state[name] = exact.normal(9, 0, stream, parameter.shape, std=0.3)
    made = tmp_path_factory.mktemp("trained")
    Captured(captured.program, state).save(made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, dict[str, str]]:
    return finish(start(REFERENCE, folder))


@pytest.mark.parametrize("configuration", OTHERS, ids=str)
def test_every_kernel_and_a_training_run_give_the_bits_of_the_plainest_processor(
    configuration: Configuration, folder: Path, reference: dict[str, dict[str, str]]
) -> None:
    if configuration.capability == "avx512" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this processor has no AVX-512, and torch told to use it dies of an illegal instruction")
    found = finish(start(configuration, folder))
    assert found["machine"]["capability"].lower() == configuration.capability
    assert reference["machine"]["capability"] == "DEFAULT"
    wrong = [name for name in reference["digests"] if found["digests"].get(name) != reference["digests"][name]]
    assert wrong == []
    assert len(found["digests"]) == len(reference["digests"]) > 40


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    given = Path(sys.argv[4])
    trained = Program.from_bytes((given / "model.program").read_bytes())
    machine = {"capability": torch.backends.cpu.get_cpu_capability()}
    first = checkpoint.load((given / "initial.safetensors").read_bytes())
    print(json.dumps({"machine": machine, "digests": compute(sys.argv[1], sys.argv[3] == "1", trained, first)}))
