# Everything runs from .venv in this checkout; the first target that needs it makes it.
# Another Python:  make clean setup PYTHON=python3.12
# Torch for CPUs:  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
TORCH := 2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := .venv/.alignlab-setup
READY_ALL := .venv/.alignlab-setup-all
UNFINISHED := .venv/.alignlab-unfinished
DEV := dev,tracking,metrics,judge
ALL := $(DEV),quant,conformance,encoder,lm-eval

.PHONY: help setup demo test test-all lint types bench starter constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv from python3 >= 3.11 and install everything into it; does nothing when that is done

demo: $(READY)  ## train and compare the methods on the starter model; ends with the path of the report
	$(BIN)/alignlab demo

test: $(READY)  ## the tests of every change
	$(BIN)/pytest -n 2 -m "not slow"

test-all: $(READY_ALL)  ## every test, the slow ones too, with all extras
	$(BIN)/pytest -n 2

lint: $(READY)  ## style, formatting and the one direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(READY)  ## strict type checks
	$(BIN)/mypy --strict src

bench: $(READY_ALL)  ## training steps beside trl's, in turn on this machine, about an hour; writes docs/performance.md
	$(BIN)/python -m benchmarks --write
	$(BIN)/python -m benchmarks scaling --peer --write
	$(BIN)/python -m benchmarks grpo-tiny sft-tiny-varied dpo-tiny-varied sft-g270 --rounds 3 --peer-defaults --write
	$(BIN)/python -m benchmarks grpo-tiny sft-tiny-varied dpo-tiny-varied sft-g270 --rounds 3 --precision bfloat16 --write

starter: $(READY)  ## rebuild the shipped starter: data and tokenizer, pretrained model, package assets
	$(BIN)/python recipes/starter/build.py
	$(BIN)/alignlab train recipes/starter/pretrain.yaml --output runs/starter-pretrain
	$(BIN)/python recipes/starter/build.py --adopt runs/starter-pretrain

constraints:  ## resolve constraints.txt anew, with all extras, in an empty environment
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv $$scratch/venv \
	  && $$scratch/venv/bin/pip install -qq torch==$(TORCH) '.[$(ALL)]' \
	  && { echo "# Made by \`make constraints\` with $$($(PYTHON) --version) and torch $(TORCH): what '.[$(ALL)]' resolved to,"; \
	    echo "# without torch's CUDA packages, which each build of torch brings in its own versions."; \
	    $$scratch/venv/bin/pip freeze --exclude alignlab | sed 's/+cpu$$//' | grep -vE '^(nvidia|cuda|triton)'; } > $$scratch/new \
	  && cp $$scratch/new constraints.txt

clean:  ## remove .venv, build outputs and the caches of tools; runs/ stays
	rm -rf .venv dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests recipes -name __pycache__ -prune -exec rm -rf {} +

# An interrupted installation leaves $(UNFINISHED) behind, and the next one starts from an empty .venv.
# torch goes first and alone, so that TORCH_INDEX decides its build and nothing else.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "alignlab needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --clear .venv; fi
	@touch $(UNFINISHED)
	@echo "Installing alignlab into .venv: once, a few minutes"
	@$(PIP) install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[$(DEV)]'
	@rm $(UNFINISHED)
	@touch $@

$(READY_ALL): $(READY)
	@$(PIP) install -c constraints.txt -e '.[$(ALL)]'
	@touch $@
