"""The published state roots, computed again: 150 exact steps of every model, in configurations of one machine."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from protocol.program import Program
from tests import models
from tests.test_exact_configurations import ROOT, Configuration, environment
from tests.vectors.make import FOLDER, STEPS, published
from worker import exact

NAMES = sorted(models.MODELS)
# One configuration runs every model whole; a step that is wrong elsewhere shows in the roots up to `MANY`, for every
# kernel has run by then, with a state that moved. What runs without the compiled helper takes twice as long, and slices
# by torch._int_mm ten times on a processor without integer dot products, so two such share the models (`python -m
# tests.vectors.make check` runs any configuration whole).
MANY = 15
CONFIGURATIONS: dict[Configuration, tuple[int, list[str]]] = {  # the longest first
    Configuration(1, "default", "auto", "AVX2", "COMPATIBLE"): (STEPS, NAMES),
    Configuration(1, "default", "float64", "SSE41", "COMPATIBLE", helper=False): (MANY, NAMES[::2]),
    Configuration(2, "default", "auto", "AVX2"): (MANY, NAMES),
    Configuration(1, "avx2", "float64", "", "AVX2", helper=False): (MANY, NAMES[1::2]),
    Configuration(2, "avx2", "auto"): (MANY, NAMES),
    Configuration(2, "default", "int8"): (MANY, NAMES[1::2]),
    Configuration(1, "avx2", "int8", helper=False): (MANY, NAMES[::2]),
}


def said_of(configuration: Configuration) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.vectors.make", "check", "--threads", str(configuration.threads)]
    command += ["--backend", configuration.backend, *([] if configuration.helper else ["--plain"])]
    steps, names = CONFIGURATIONS[configuration]
    command += ["--steps", str(steps), "--models", ",".join(names)]
    surroundings = environment(configuration)
    done = subprocess.run(command, env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_this_machine_gives_the_published_roots(configuration: Configuration) -> None:
    if configuration.backend == "int8" and not exact.int8_is_exact():
        pytest.skip("torch._int_mm saturates on this processor, so exact products refuse it")
    found = said_of(configuration)
    assert found["wrong"] == []
    assert str(found["capability"]).lower() == configuration.capability


def test_the_vectors_are_of_every_model_and_of_the_programs_beside_them() -> None:
    vectors = published()
    assert set(vectors["models"]) == set(models.MODELS)
    assert vectors["steps"] == STEPS >= 150
    assert [names for steps, names in CONFIGURATIONS.values() if steps == STEPS] == [NAMES]
    many = [name for steps, names in CONFIGURATIONS.values() if steps >= MANY for name in names]
    assert all(many.count(name) >= 5 for name in NAMES)
    for name, expected in vectors["models"].items():
        program = Program.from_bytes(gzip.decompress((FOLDER / f"{name}.program.gz").read_bytes()))
        state = models.state_of(program)
        assert len(set(expected["roots"].values())) == len(expected["roots"]), "a state that does not move"
        assert set(state) == {update.name for update in program.updates}
