# Every verb works as the first command after a clone: it makes .venv when that is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
RECIPES := models/training/recipes
TRAIN_STEPS := diffusion:fashion-dit exits:fashion-exits exits:fashion-gears members:fashion-ensemble bridge:fashion-bridge distill:fashion-student heads:fashion-heads distance:fashion-distance
DATA ?= /usr/share/datasets/fashion-mnist
OUT ?= out

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check bench chaos train

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-7s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Offramp needs Python 3.11 or newer, but $(PYTHON) is %d.%d: make PYTHON=python3.12 setup" % v[:2])'
	@echo "[1/3] $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(TORCH) (the largest download)"
	@$(PIP) "$(TORCH)"
	@echo "[3/3] offramp and its tools"
	@$(PIP) --editable '.[cpu,embedded,dev]'
	@touch $@

demo: $(STAMP)  ## start the service, draw and classify, write the picture, stop
	@$(BIN)/offramp demo

serve: $(STAMP)  ## run gateway, worker and embedded store on port 8000 until Ctrl-C
	@$(BIN)/offramp up

test: $(STAMP)  ## run every test, with coverage
	@$(BIN)/pytest --cov --cov-report=term

check: $(STAMP)  ## format, lint, types, layers, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py tests/test_docs.py

bench: $(STAMP)  ## short form of every benchmark in benchmarks/, three minutes each at most
	@found=$$(ls benchmarks/bench_*.py 2>/dev/null) || { echo "no benchmarks/bench_*.py"; exit 0; }; \
	for script in $$found; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

chaos: $(STAMP)  ## 10,000 jobs while something breaks every 15 s (half an hour at most)
	@$(BIN)/python -m tests.chaos.long

train: $(STAMP)  ## train the shipped models again: make train DATA=DIR OUT=DIR
	@for step in $(TRAIN_STEPS); do \
	  $(BIN)/offramp train "$${step%%:*}" --recipe "$(RECIPES)/$${step##*:}.toml" --data "$(DATA)" --out "$(OUT)" || exit 1; \
	done
