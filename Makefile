# One Makefile for people, hooks and CI. Every target creates what it needs.
#
#   VENV=.venv        the environment to use
#   PYTHON=python3.12 the interpreter it is made with (default: the first of 3.11, 3.12, ... found)
#   PIP_FLAGS=...     further pip options, for example
#                     --extra-index-url https://download.pytorch.org/whl/cpu for the small CPU build of torch

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PYTHON ?=
PIP_FLAGS ?=
# three on two cores: a third of the time tests wait for other processes
PYTEST_FLAGS ?= -n 3
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.installed

# Compiled once for all the processes that the tests start, and not beside the sources.
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
	  while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

.PHONY: venv
venv: $(READY) ## Create the environment with exactly what CI tests

$(READY): pyproject.toml constraints.txt
	@scripts/make_venv.sh "$(VENV)" "$(PYTHON)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: demo
demo: $(READY) ## Train tiny experts and a router, serve them, show fused answers
	$(BIN)/fusionroute demo

# pytest runs last, so that its closing line closes the whole run.
.PHONY: test
test: lint typecheck imports protos-lint protos-check docs-check wheel-test pytest ## Everything CI checks

.PHONY: pytest
pytest: $(READY) ## The tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

.PHONY: lint
lint: $(READY) ## Style (ruff)
	$(BIN)/ruff check .

.PHONY: format
format: $(READY) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .

.PHONY: typecheck
typecheck: $(READY) ## Types (mypy, strict)
	$(BIN)/mypy

.PHONY: imports
imports: $(READY) ## Who may import whom (import-linter)
	$(BIN)/lint-imports

.PHONY: protos
protos: $(READY) ## Generate fusionroute/v1 from protos/
	$(BIN)/python scripts/stubs.py

.PHONY: protos-lint
protos-lint: $(READY) ## Style of the contract (buf)
	$(BIN)/buf lint protos

.PHONY: protos-check
protos-check: $(READY) ## Fail if fusionroute/v1 is not what protos/ gives
	$(BIN)/python scripts/stubs.py --check

.PHONY: docs
docs: $(READY) ## Generate the pages that are made from code
	$(BIN)/python docs/generate.py

.PHONY: docs-check
docs-check: $(READY) ## Fail if a generated page is stale
	$(BIN)/python docs/generate.py --check

.PHONY: wheel-test
wheel-test: $(READY) ## Build the wheel, use it from outside the checkout
	$(BIN)/python scripts/wheel_test.py

.PHONY: constraints
constraints: ## Resolve the dependencies anew and write constraints.txt
	scripts/make_constraints.sh "$(PYTHON)" $(PIP_FLAGS)

.PHONY: browser-test
browser-test: $(READY) ## The playground in headless Chromium (apt-get install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(BROWSER_FLAGS) tests/browser

.PHONY: chaos
chaos: $(READY) ## The kill matrix: every part hurt in every way while it writes (ten minutes)
	$(BIN)/python -m tests.chaos $(CHAOS_FLAGS)

.PHONY: eval-test
eval-test: $(READY) ## Extra: evaluations and studies from nothing to their report (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m whole -n 0 tests

.PHONY: bench
bench: $(READY) ## Measure everything that docs/performance.md shows, and fill it (half an hour)
	$(BIN)/fusionroute bench all --output benchmarks/results $(BENCH_FLAGS)
	$(BIN)/python docs/performance.py

.PHONY: judge-tgi
judge-tgi: $(READY) ## Extra: huggingface_hub's and TGI's own clients judge our TGI API (pip)
	$(BIN)/python -m pytest -m judges -n 0 -rA tests/judges/test_tgi_judges.py

.PHONY: judge-openai
judge-openai: $(READY) ## Extra: clients and checkers of other people judge our OpenAI API (pip, npm)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m judges -n 0 $(JUDGE_FLAGS) tests/judges/test_openai_judges.py

.PHONY: judge-harness
judge-harness: $(READY) ## Extra: lm-evaluation-harness runs our own tasks against the trained demo family (pip)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m judges -n 0 --durations=0 tests/judges/test_harness.py

.PHONY: judges
judges: judge-tgi judge-openai judge-harness ## Extra: all judges of the HTTP APIs

export COMPOSE ?= docker compose

.PHONY: compose-up
compose-up: ## Build the image and start redis, three experts and the router (docker)
	$(COMPOSE) build
	$(COMPOSE) up -d

.PHONY: compose-down
compose-down: ## Stop them and remove what they left
	$(COMPOSE) down --volumes --remove-orphans

.PHONY: compose-test
compose-test: $(READY) ## Extra: build, start, generate through the containers, stop (docker)
	$(BIN)/python -m pytest -m docker --timeout 1800 tests/e2e

.PHONY: clean
clean: ## Remove what the targets above made
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
