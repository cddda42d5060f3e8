# `make demo` and `make test` create .venv by themselves; the README gives the same steps without make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tested build of torch, asked for by name so that a CPU build that pip already knows of is taken. Empty: newest.
TORCH ?= torch==2.13.0

.PHONY: demo test check faults real clean

demo: $(VENV)/.core
	$(BIN)/safesteer-lite demo

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check safesteer_lite tests
	$(BIN)/ruff check safesteer_lite tests
	$(BIN)/mypy

faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults

real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real

$(VENV)/.core: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
