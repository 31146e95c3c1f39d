# `make demo` and `make test` start from nothing: they create .venv, install, and run. Settings of the set-up
# (PYTHON, EXTRAS, TORCH, INSTALLER, VENV) are explained in scripts/setup.sh; give them as `make test PYTHON=python3.12`.
SHELL := bash
VENV ?= .venv
export VENV PYTHON EXTRAS TORCH INSTALLER

BIN := $(VENV)/bin
# One torch thread per test worker: more threads than cores stall each other.
WORKERS ?= logical
ARGS ?=

.PHONY: help setup demo figures test lint format constraints clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: ## create or update .venv
	@bash scripts/setup.sh

demo: setup ## dense against FAST-AR and a window of equal bytes: table, plots, video
	$(BIN)/python experiments/compare.py experiment=demo $(ARGS)

# Beside what is installed already; the notebooks need no more than the library and these.
figures: EXTRAS := analysis
figures: setup ## the figures of analysis/, from the recorded results
	OMP_NUM_THREADS=1 $(BIN)/python scripts/figures.py

test: setup ## the whole test suite, in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: setup ## rewrite files as ruff wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

constraints: ## resolve constraints.txt anew (needs uv); torch and what comes with its CUDA build stay out of it
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-package torch --no-header --no-annotate --upgrade \
	  --extra analysis --extra cpu --extra dev --extra doom --extra features --extra launchers --extra text pyproject.toml \
	  | grep -vE '^(nvidia|cuda|triton)' > constraints.txt

clean: ## remove what make, tests and linters made; runs under outputs/ stay
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
