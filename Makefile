# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv first.
# TORCH=cpu (default) installs the CPU build of PyTorch; TORCH=cuda installs PyPI's CUDA build (several GB).
# The tests run in one process more than there are cores, at most four: each takes up to 1.5 GB (tests/conftest.py).
PYTHON ?= python3
TORCH ?= cpu

.PHONY: demo test setup clean

demo: setup
	.venv/bin/ichiba swarm demo

test: setup
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n auto

setup:
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh ./setup.sh

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
