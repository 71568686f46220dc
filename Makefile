# make run: the demo, from nothing.  make test: lint, types and tests.  Both set .venv up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint ui clean
.DEFAULT_GOAL := run

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt hatchling editables setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch .venv/ready

run: .venv/ready
	$(BIN)/lorasweep train -m +sweeps=demo
	$(BIN)/lorasweep pick

test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

ui: .venv/ready
	$(BIN)/lorasweep ui

clean:
	rm -rf .venv outputs
