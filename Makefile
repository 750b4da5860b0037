# `make demo` and `make test` do all set-up on their own: Python >= 3.10, make and a package index is all they need.
#   make demo [DATA=path]   train a small model and print the report
#   make test [ARGS="-k ne"]
#   make gpu                on a machine with a GPU: install, GPU tests, benchmark; 25 minutes, see benchmarks/README.md
#   make lint               ruff and mypy
#   make format             let ruff rewrite the files
#   make docs               build the documentation into site/
#   make bench              a few points of the Pareto fronts on a made-up log (about a minute); see benchmarks/README.md
#   make plots              draw the figures of benchmarks/results anew
#   make install            set-up alone; STACK=cuda for the CUDA build
#   make clean              remove the environment
PYTHON ?= python3
VENV ?= .venv
STACK ?= cpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(STACK)
REQUIREMENTS := $(wildcard requirements/*.txt)

.PHONY: help install demo test gpu gpu-run lint format bench plots clean docs
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^PYTHON/{/^#/s/^# \{0,1\}//p}' Makefile

install: $(STAMP)

# An environment that was made by hand has no stamp: it is completed in place, never rebuilt.
$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; pass PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/$(STACK).txt -r requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/torchrec.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m lightning_embcomp.demo $(if $(DATA),--data "$(DATA)")

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Tests that fail do not keep the benchmark from running.
gpu:
	@$(MAKE) --no-print-directory gpu-run STACK=cuda

gpu-run: $(STAMP)
	$(BIN)/python -c 'import lightning_embcomp, torch; print(torch.__version__, torch.cuda.get_device_name())'
	@status=0; mkdir -p build; \
	$(BIN)/python -m pytest -m gpu -n 0 --junitxml=build/gpu-tests.xml tests/gpu $(ARGS) || status=1; \
	$(BIN)/python -m benchmarks gpu || status=1; \
	exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks pareto quick

plots: $(STAMP)
	$(BIN)/python -m benchmarks plots

clean:
	rm -rf $(VENV) build site *.egg-info
