"""The published state roots, computed again: 150 exact steps of every model, in six configurations of one machine."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from protocol.program import Program
from tests import models
from tests.test_exact_configurations import ROOT, Configuration, environment
from tests.vectors.make import FOLDER, STEPS, published
from worker import exact

CONFIGURATIONS = [
    Configuration(1, "default", "float64", "SSE41", "COMPATIBLE", helper=False),
    Configuration(2, "default", "auto", "AVX2"),
    Configuration(1, "avx2", "float64", "", "AVX2", helper=False),
    Configuration(2, "avx2", "auto"),
    Configuration(1, "avx2", "int8", helper=False),
    Configuration(2, "default", "int8"),
]
AT_ONCE = 2  # processes: as many as CI has cores


def said_of(configuration: Configuration) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.vectors.make", "check", "--threads", str(configuration.threads)]
    command += ["--backend", configuration.backend, *([] if configuration.helper else ["--plain"])]
    surroundings = environment(configuration)
    done = subprocess.run(command, env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Configuration, Future[dict[str, object]]]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {configuration: pool.submit(said_of, configuration) for configuration in CONFIGURATIONS}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_this_machine_gives_the_published_roots(
    configuration: Configuration, runs: dict[Configuration, Future[dict[str, object]]]
) -> None:
    if configuration.backend == "int8" and not exact.int8_is_exact():
        pytest.skip("torch._int_mm saturates on this processor, so exact products refuse it")
    found = runs[configuration].result()
    assert found["wrong"] == []
    assert str(found["capability"]).lower() == configuration.capability


def test_the_vectors_are_of_every_model_and_of_the_programs_beside_them() -> None:
    vectors = published()
    assert set(vectors["models"]) == set(models.MODELS)
    assert vectors["steps"] == STEPS >= 150
    for name, expected in vectors["models"].items():
        program = Program.from_bytes(gzip.decompress((FOLDER / f"{name}.program.gz").read_bytes()))
        state = models.state_of(program)
        assert len(set(expected["roots"].values())) == len(expected["roots"]), "a state that does not move"
        assert set(state) == {update.name for update in program.updates}
