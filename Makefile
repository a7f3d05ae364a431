# make serve   a server with the bundled demo model at 127.0.0.1:8000
# make test    everything that CI tests
# make demo    a burst of requests while the layout changes
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
MODEL ?= checkpoints/demo/model
DEVICES ?= 4
PYTEST_WORKERS ?= 2
CI_MARKS := not stress and not gpu and not h200 and not parity
NAME ?= $(if $(filter checkpoints/demo/model,$(MODEL)),demo,$(notdir $(MODEL)))

BIN := $(VENV)/bin

.PHONY: help serve demo test test-fast conformance stress lint format notebooks parity golden check-h200 check-gpu gpu-report train-demo clean

help:
	@sed -n 's/^# make/make/p' Makefile

$(BIN)/fly-jax: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fly-jax needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/fly-jax
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

serve: $(BIN)/fly-jax
	$(BIN)/fly-jax serve $(MODEL) --devices $(DEVICES) --port $(PORT) --served-model-name $(NAME)

# make demo URL=http://127.0.0.1:8000    the same at a running server
demo: $(BIN)/fly-jax
	$(BIN)/fly-jax demo $(if $(URL),--url $(URL))

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m "$(CI_MARKS)"

# make test-fast    what is not marked slow, for the loop while working
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m "not slow and $(CI_MARKS)"

# make conformance    real clients against a server; each has an environment of its own in .cache/conformance
conformance: $(BIN)/fly-jax
	$(BIN)/python -m tests.conformance $(CLIENTS)

# make stress    what takes longer than CI allows
stress: $(VENV)/.dev
	$(BIN)/python -m pytest -m stress

# make lint    ruff and mypy
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make notebooks    runs the notebooks and keeps what they print and draw
notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/execute.py

# make parity    live comparison with transformers (installs torch)
parity: $(VENV)/.dev
	$(BIN)/python -c 'import torch, transformers' 2>/dev/null || $(BIN)/python -m pip install --quiet 'torch>=2.6' 'transformers>=4.57'
	$(BIN)/python -m pytest -m parity

# make golden    writes the golden values again (installs torch)
golden: $(VENV)/.dev
	$(BIN)/python -c 'import torch, transformers' 2>/dev/null || $(BIN)/python -m pip install --quiet 'torch>=2.6' 'transformers>=4.57'
	$(BIN)/python -m tests.golden.make_golden

# make check-h200    compiles the kernels and the steps for a node of H200s; needs the CUDA plugin, no GPU
check-h200: $(VENV)/.dev
	$(BIN)/python -c 'import jax_cuda12_plugin' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[cuda12]'
	$(BIN)/python -m pytest -m h200

# make check-gpu    tests the kernels on a real GPU
check-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# make gpu-report    what one GPU can tell in eight minutes, in build/gpu
gpu-report: $(VENV)/.dev
	$(BIN)/python -m fly_jax.bench gpu

# make train-demo    trains the bundled model again (under an hour on two cores)
train-demo: $(VENV)/.dev
	$(BIN)/python -m checkpoints.demo.train --out build/demo

clean:
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache
