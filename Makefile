# Every target sets up what it needs: .venv holds the dependencies that constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
# The oldest versions are tried on the Python of the GPU images that have them, where it is there.
PYTHON_OLDEST ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
OLDEST := .venv-oldest/bin
TESTS ?= tests
PARTS ?= own gpu rehearsal

.DEFAULT_GOAL := help
.PHONY: demo test test-long test-oldest test-null-gpu lint docs bench readme clean help

demo: .venv/base  ## raw text to a model that writes stories
	$(BIN)/tilewright demo

test: .venv/dev  ## the tests, but those that take minutes
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-long: .venv/dev  ## what takes minutes: the compiler's gate of every architecture, runs killed at every operation
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m long

test-oldest: .venv-oldest/dev  ## the suite, or TESTS, on the oldest versions that pyproject.toml allows
	$(OLDEST)/pytest --numprocesses 2 --dist worksteal $(TESTS)

test-null-gpu: .venv-oldest/dev  ## the GPU-marked tests and a first run, or PARTS, on a GPU that computes nothing
	cd tests && ../$(OLDEST)/python -m null_gpu $(PARTS)

lint: .venv/dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/docs  ## the documentation site, to build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/bench  ## measure everything that this machine can, beside its peers
	$(BIN)/tilewright bench all
	$(BIN)/tilewright bench report

readme: .venv/base  ## run the demo and put what it measured into README.md
	$(BIN)/python -m tilewright.bench.readme

clean:  ## remove the environment and everything built or cached; data/ and runs/ stay
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, this is {sys.version}")'
	$(PYTHON) -m venv .venv

.venv/base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,plot]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/base

.venv/docs: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

.venv/bench: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

# PyTorch's CUDA build without NVIDIA's libraries; tests/null_gpu stands in for them. It needs gcc, and downloads 0.8 GB.
.venv-oldest/dev: constraints-min.txt pyproject.toml $(wildcard tests/null_gpu/*.c tests/null_gpu/*.h tests/null_gpu/install.py)
	$(PYTHON_OLDEST) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"Python 3.11 or 3.12 is needed, this is {sys.version}")'
	test -x $(OLDEST)/python || $(PYTHON_OLDEST) -m venv .venv-oldest
	$(OLDEST)/pip install --quiet --no-deps --requirement constraints-min.txt
	$(OLDEST)/python tests/null_gpu/install.py
	$(OLDEST)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
