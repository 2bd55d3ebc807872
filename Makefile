# Every target makes its environment first, so each is a fresh machine's only command.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

help:  ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# The engines that the default tests decode with: without them the tests fail, and so does this.
$(BIN)/.engines: $(BIN)/.installed
	$(BIN)/pip install -q --no-deps dflash==0.1.0 xllamacpp
	touch $@

setup: $(BIN)/.engines  ## make .venv with the package, its tools and the engines of the tests

demo: $(BIN)/.installed  ## train a drafter for a real LLM and show what it gains (ARGS=--quick for a short one)
	$(BIN)/dpace demo $(ARGS)

test: setup  ## run the tests, a process for each core (ARGS='-m wide' for more cases, '-m slow' for the real model)
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal $(ARGS)

check: setup  ## lint, format check, types, and who may import whom
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports && $(BIN)/hadolint docker/*

$(BIN)/.docs: $(BIN)/.installed
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

docs: $(BIN)/.docs  ## build the pages as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

package: setup  ## build the source archive and the wheel: dist/
	$(BIN)/python -m hatchling build

.PHONY: help setup demo test check docs package
