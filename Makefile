# make setup       a virtual environment in .venv with the tested versions
# make quickstart  train the toy world into runs/quickstart, before/after table and curves
# make test        all tests
# make lint        formatter, linter, type checker
# make bench       benchmarks
# make bench-retrieval   indexing and search: a corpus of a million passages is made, and takes minutes

PYTHON ?= python3
BIN := .venv/bin

# Tiny models are fastest on one thread, and two OpenMP threads beside another busy process are many times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
TEST_PROCESSES ?= 2

.PHONY: setup quickstart test lint bench bench-retrieval clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints/tested.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints/tested.txt torch
	$(BIN)/pip install --quiet --constraint constraints/tested.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml dro_rl/train.py recipes/quickstart.yaml --resume_from_checkpoint auto

test: setup
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.selector_update

bench-retrieval: setup
	$(BIN)/python -m benchmarks.retrieval

clean:
	rm -rf .venv build dist *.egg-info runs
