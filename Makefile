# Needs make and Python 3.10 or newer. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# An extra index to take torch from, such as https://download.pytorch.org/whl/cpu for the small build without CUDA.
TORCH_INDEX ?=
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo bench measure figures test lint format train clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 16
	@echo
	@echo "ARGS='...' is passed on to demo and bench. Where pip would fetch a CUDA build that you do not want:"
	@echo "  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"

demo: $(VENV)/.run ## make a film with the bundled model, cached and uncached, in out/demo
	$(BIN)/python -m flowcache_core demo --out out/demo $(ARGS)

bench: $(VENV)/.run ## measure closeness at equal compute, beside fewer steps, into out/frontier.json (about an hour)
	@mkdir -p out
	$(BIN)/python -m flowcache_core bench frontier --workers 2 --json out/frontier.json $(ARGS)

BENCH := $(BIN)/python -m flowcache_core bench
measure: $(VENV)/.run ## measure all that README and docs show, at this commit, into docs/bench (some five hours on two idle cores)
	$(BIN)/python -m flowcache_core demo --out out/demo && cp out/demo/report.json docs/bench/demo.json
	$(BENCH) recall --clips 6 --json docs/bench/recall.json
	$(BENCH) seam --prompts 2 --json docs/bench/seam.json
	$(BENCH) kv --prompts 12 --workers 2 --json docs/bench/kv.json
	$(BENCH) kv --precision float32 --policies even --prompts 6 --clips 1 --json docs/bench/kv-float32.json
	$(BENCH) kv --policies "even,even stands_for=1,even stands_for=2,even stands_for=8,random" --prompts 6 --clips 1 --json docs/bench/kv-stands-for.json
	$(BENCH) frontier --workers 2 --json docs/bench/frontier.json
	$(BENCH) frontier --grid usual --prompts-file docs/bench/drawn.tsv --arms steps,steps-fractional,default --workers 2 --json docs/bench/frontier-drawn.json
	$(BENCH) frontier --grid usual --shares 0.12 --workers 2 --json docs/bench/frontier-eighth.json
	$(BENCH) frontier --grid usual --attention bidirectional --prompts 4 --shares 0.2,0.12 --workers 2 --json docs/bench/frontier-rows.json
	$(BENCH) frontier --grid usual --prompts-file docs/bench/drawn.tsv --shares 0.12 --arms steps,steps-fractional,even,default --workers 2 --json docs/bench/frontier-eighth-drawn.json
	$(BENCH) frontier --grid usual --steps 30 --prompts 1 --shares 0.3 --arms steps,steps-fractional,default --workers 2 --json docs/bench/frontier-30.json
	$(BENCH) magi --workers 2 --json docs/bench/magi.json
	$(BENCH) causal --prompts 16 --workers 2 --json docs/bench/causal.json
	$(BENCH) kv --model tiny-causal --policies "even,h2o,importance-redundancy,salience,sink-recent,random" --as-computed --clips 16 --prompts 16 --workers 2 --json docs/bench/kv-causal.json
	$(BENCH) long --prompts 16 --share 0.4 --workers 2 --json docs/bench/long.json
	$(BENCH) long --arms random --prompts 16 --share 0.4 --workers 2 --json docs/bench/long-random.json
	$(BENCH) long --arms "shorter window; even, no sink" --prompts 16 --share 0.4 --workers 2 --json docs/bench/long-sink.json
	$(BENCH) rendered --frames 57 --json docs/bench/rendered.json
	$(BENCH) step --steps 4 --json docs/bench/step.json
	$(BENCH) step --steps 4 --threads 2 --json docs/bench/step-2.json
	$(BENCH) step --steps 4 --model tiny-magi --frames 96 --json docs/bench/step-magi.json
	$(BENCH) row --json docs/bench/row.json
	$(BENCH) row --model skyreels-1.3b --layers 1 --size 256 --rows 3 --json docs/bench/row-wide.json
	$(BIN)/torchrun --nproc-per-node 2 -m flowcache_core bench scale --json docs/bench/scale-2.json
	$(BIN)/torchrun --nproc-per-node 4 -m flowcache_core bench scale --json docs/bench/scale-4.json

figures: $(VENV)/.run ## write the tables and charts of README and docs from docs/bench
	$(BIN)/python -m flowcache_core figures $(ARGS)

test: lint ## lint, types and all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.run ## show how the bundled model is trained
	$(BIN)/python -m flowcache_core.training --help

clean: ## remove the virtual environment, outputs and caches
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that it comes from where it was asked for and nothing else decides about it
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing). Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt -e '.[fleet]' || echo "Ray cannot be installed here: the tests that need it are skipped" >&2
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install -q -c constraints.txt -e '.[kernels]' || \
	   echo "Triton cannot be installed here: the tests of its kernels are skipped" >&2
	@touch $@
