# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: help install check test test-gpu test-slow compile-check peers hooks demo demo-all bench bench-gpu tune clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv with the library and what development needs

# torch comes first, by itself: nothing else then chooses another build of it. A CPU build gets the
# Triton whose interpreter the kernel tests use (its loops need numpy below 2.4).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gdn2 needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	  $(PIP) install -q -c constraints.txt triton==3.6.0; fi
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The operators as users run them, on all threads; the rest side by side, each on one.
QUICK := not slow and not gpu and not triton
test: $(INSTALLED)  ## the tests that run everywhere, in minutes
	$(BIN)/python -m pytest -m '$(QUICK)' tests/ops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '$(QUICK)' -n 2 --dist loadfile --ignore tests/ops
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton -n 2 tests/ops tests/layers tests/models tests/benchmarks

compile-check: $(INSTALLED)  ## compile the Triton kernels for GPUs that are not here; show the table
	$(BIN)/python tests/compiled_kernels.py

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m 'gpu or triton' -n 8 tests/ops tests/layers tests/models

test-slow: $(INSTALLED)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

# The peers pin their own torch and triton; only their sources are wanted, and no kernels are built.
peers: $(PEERS)  ## install other projects' implementations, which the tests then compare with
$(PEERS): $(INSTALLED)
	$(PIP) install -q --no-deps fla-core==0.6.0 flash-linear-attention==0.6.0 einops==0.8.2
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) install -q --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	@touch $@

hooks: $(INSTALLED)  ## run the checks of .pre-commit-config.yaml at every commit from now on
	$(PIP) install -q -c constraints.txt -e '.[hooks]'
	$(BIN)/pre-commit install

demo: $(INSTALLED)  ## train, evaluate and sample four small models; writes runs/demo/report.html
	$(BIN)/python -m recipes.demo

demo-all: $(INSTALLED)  ## the same with all 16 systems and hybrids; writes runs/demo-all/report.html
	$(BIN)/python -m recipes.demo --all

bench: $(INSTALLED)  ## time the operator on this machine; adds to benchmarks/results.csv
	$(BIN)/python -m benchmarks.gated_delta_rule

bench-gpu: $(INSTALLED)  ## time kernels, layers and training on this GPU; adds to the same file
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu_layers

tune: $(INSTALLED)  ## find the kernels' sizes on this GPU; writes gdn2/ops/triton/sizes.csv
	$(BIN)/python -m benchmarks.tune

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
