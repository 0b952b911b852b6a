# Everything a developer does, one target each; CI calls the same ones.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/uv pip install --python $(BIN)/python
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header $(if $(UPGRADE),--upgrade)

# Containers often set it; every process would then read torch's 2,000 modules as text, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup serve test test-slow test-gpu check format bench docs lock clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/installed  ## create .venv and install the locked dependencies

serve: setup  ## train the model digits if there is none, and serve on http://127.0.0.1:8000
	@exec $(BIN)/pytorchlib serve --quickstart

test: setup  ## the quick tests
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 -m "not slow and not gpu"

test-slow: setup  ## real servers, browsers, kills
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 2 -m "slow and not alone and not gpu"
	$(BIN)/python -m pytest -m "slow and alone and not gpu"

test-gpu: setup  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

check: setup  ## format, lint, types, arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_arrows.py

format: setup  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## a short run of every benchmark; ratios measured in one run
	$(BIN)/python -m benchmarks

docs: setup  ## write what the documentation repeats from the code
	$(BIN)/python docs/generate.py

lock: $(BIN)/uv  ## write the lock files from pyproject.toml; UPGRADE=1 takes the newest versions
	$(LOCK) --output-file requirements-dev.lock --extra dev pyproject.toml
	$(LOCK) --output-file requirements.lock --constraints requirements-dev.lock \
		--extra postgresql --extra tracing pyproject.toml
	$(LOCK) --output-file requirements-build.lock --constraints requirements-dev.lock --group build

clean:  ## remove what was installed and built; models, datasets and jobs in var/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find app models training tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: pyproject.toml requirements-dev.lock | $(BIN)/uv
	$(INSTALL) --require-hashes --requirement requirements-dev.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(BIN)/uv: requirements-build.lock | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PyTorchLib needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo '$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv
