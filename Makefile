# Python 3.10 to 3.13 and make are all that a machine needs (training.compile: a C++ compiler); `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PYTHONS ?= python3.10 python3.11# of `make constraints`: the oldest supported one, and each from which versions differ
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
WORKERS ?= 2# test processes at once
TEST_TIMEOUT ?= 300# seconds that one test may take

VENV := .venv
RUN := $(VENV)/bin/python -m
PYTEST = $(RUN) pytest --timeout $(TEST_TIMEOUT) -n $(WORKERS) --dist loadscope --no-loadscope-reorder
# Named after the folder: a copied or moved checkout is installed again, and does not run the code of the old folder.
STAMP := $(VENV)/.installed.$(shell pwd | cksum | cut -d' ' -f1)

.PHONY: help setup demo test test-failed check lint soak gpu bench-learn container constraints clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(STAMP) ## create .venv and install (PYTHON=python3)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] < (3, 14) or sys.exit("error: $(PYTHON) is Python %d.%d; Evspan needs 3.10 to 3.13: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@rm -f $(VENV)/.installed*
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --upgrade -c constraints.txt pip
	$(RUN) pip install -c constraints.txt --build-constraint constraints.txt torch
	$(RUN) pip install -c constraints.txt --build-constraint constraints.txt -e '.[test]'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/evspan # the package under its name, for mypy and editors
	@touch $@

demo: setup ## simulate, prepare, train, evaluate and infer in minutes; results in demo/
	@$(RUN) evspan.launch.cli.demo

test: lint ## style, types, and all tests but the campaigns (PYTEST_ARGS, WORKERS, TEST_TIMEOUT)
	@$(PYTEST) $(PYTEST_ARGS)

test-failed: lint ## the tests that failed last, once more, one after the other
	@$(RUN) pytest --timeout $(TEST_TIMEOUT) --last-failed --last-failed-no-failures none --maxfail 1 -v $(PYTEST_ARGS)

check: lint ## style, types and the fast tests, in about a minute
	@$(PYTEST) -m 'not slow and not soak' $(PYTEST_ARGS)

lint: setup ## style and types: ruff format, ruff check, mypy
	@$(RUN) ruff format --check --quiet || { echo 'error: files above are not formatted: $(RUN) ruff format' >&2; exit 1; }
	@$(RUN) ruff check
	@$(RUN) mypy

soak: setup ## long campaigns, then the demo; write the results into tests/benchmarks/LOG.md
	@$(RUN) pytest -m soak --timeout 0 -s $(PYTEST_ARGS)
	@$(RUN) evspan.launch.cli.demo

gpu: setup ## check and measure one GPU, in at most 8 minutes (GPU_ARGS; tests/gpu/README.md)
	@$(VENV)/bin/python tests/gpu/check.py $(GPU_ARGS)

bench-learn: setup ## the learning study, hours on 2 cores (BENCH_ARGS=--quick)
	@$(VENV)/bin/python tests/benchmarks/learn.py $(BENCH_ARGS)

container: ## an image (DEVICE=cpu or cuda, FORMAT=image, sif or sqsh; containers/README.md)
	@containers/build

constraints: ## resolve all dependencies again into constraints.txt (PYTHONS)
	$(PYTHON) .ci/constraints $(PYTHONS)

clean: ## remove what was built, the demo's folder and caches (.venv stays)
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find conf data_prep launch pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
