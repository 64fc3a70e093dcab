# Needs make and Python >= 3.11, nothing else. Every target sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e

# The whole demonstration: pre-train a base, train it by RL, write the report.
DEMO := OMP_NUM_THREADS=1 $(BIN)/rescore train sudoku_egspo --evaluate.control

# One thread per process: tiny models are slower on several, and results do not depend on the machine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint docs bench clean
.NOTPARALLEL:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BASE)  ## the library and its command, .venv/bin/rescore

demo: $(BASE)  ## train a small masked-diffusion model to solve Sudoku (minutes)
	$(DEMO)

test: lint  ## lint, then every test but the slow ones
	$(PYTEST) -n 2 --dist worksteal -m "not slow"

test-slow: $(DEV)  ## the slow tests
	$(PYTEST) -m slow

lint: $(DEV)  ## style, types and the import rules of the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

docs: $(DEV)  ## the documentation, into site/
	$(BIN)/mkdocs build --strict

bench: $(DEV)  ## where an RL step spends its time, and what the library adds to the bare network
	$(BIN)/rescore bench

clean:  ## remove what was built; keep .venv and runs/
	rm -rf dist site .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(BASE): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) ".[dev]"
	@touch $(BASE) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rescore needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one: make PYTHON=python3.12 install" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
