# `make demo` and `make test` create .venv by themselves; the README gives the same steps without make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tested build of torch, asked for by name so that a CPU build that pip already knows of is taken.
TORCH ?= torch==2.13.0

.PHONY: demo test check faults real build lock clean

demo: $(VENV)/.ready
	$(BIN)/safesteer-lite demo

test: check
	$(BIN)/python -m pytest --slow

check: $(VENV)/.ready
	$(BIN)/ruff format --check safesteer_lite tests
	$(BIN)/ruff check safesteer_lite tests
	$(BIN)/mypy

faults: $(VENV)/.ready
	$(BIN)/python -m pytest -m faults

real: $(VENV)/.ready
	$(BIN)/python -m pytest -m real

# The wheel and the sdist, in dist/; without the network, since what builds them is in .venv.
build: $(VENV)/.ready
	$(BIN)/python -m build --no-isolation

# Every package but torch, whose files differ with the card and the system, comes with the tested version and its hash.
$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# For maintainers, with uv: pins anew what pyproject.toml allows, then leaves out torch and what only its builds for cards need.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-annotate --no-header \
		pyproject.toml > requirements.new
	( sed -n '/^#/p' requirements.lock; sed -E '/^(torch|triton|nvidia-|cuda-)/,/[^\\]$$/d' requirements.new ) > requirements.tmp
	rm requirements.new && mv requirements.tmp requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
