# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt. The tests with
# transformers 4 have one of their own, .venv4 with the versions of constraints4.txt.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENV4 := .venv4
READY4 := $(VENV4)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-transformers4 classes check install clean

help: ## Show this list.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20

demo: $(READY) ## Compile a small Mixture-of-Experts model, show what was rewritten, and time it.
	$(BIN)/python examples/quickstart.py

test: check ## Run the checks and all tests. PYTEST_ARGS="-k name" picks some; WORKERS=4 runs four at a time.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-transformers4: $(READY4) ## Run the tests with a transformers 4, whose experts are modules in a list, in .venv4.
	OMP_NUM_THREADS=1 $(VENV4)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) tests/transformers4

classes: $(READY) ## Write docs/experts-classes.md: what becomes of every experts class of transformers.
	$(BIN)/python tests/experts_classes.py > docs/experts-classes.md.new
	mv docs/experts-classes.md.new docs/experts-classes.md

check: $(READY) ## Run the linter, the formatter's check and the type checker.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

install: $(READY) ## Only set up .venv.

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(READY4): pyproject.toml constraints4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints4.txt
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean: ## Remove .venv, .venv4 and all caches.
	rm -rf $(VENV) $(VENV4) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
