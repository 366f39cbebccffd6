# Every target sets up what it needs: .venv holds the dependencies that constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test lint bench readme clean help

demo: .venv/base  ## raw text to a model that writes stories
	$(BIN)/tilewright demo

test: .venv/dev  ## the whole test suite
	$(BIN)/pytest --numprocesses 2 --dist worksteal

lint: .venv/dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/bench  ## measure everything that this machine can, beside its peers
	$(BIN)/tilewright bench all
	$(BIN)/tilewright bench report

readme: .venv/base  ## run the demo and put what it measured into README.md
	$(BIN)/python -m tilewright.bench.readme

clean:  ## remove the environment and everything built or cached; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, this is {sys.version}")'
	$(PYTHON) -m venv .venv

.venv/base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/base

.venv/bench: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
