# One virtual environment in .venv, made on first use and remade when pyproject.toml changes.
#
#   make quickstart          post-train a small DeepSeek-V4, every parameter of it, on this machine's CPU
#   make test                the tests that take seconds each
#   make help                everything else
#
# PYTHON=/path/to/python3.12   the interpreter to use (default: the first on PATH that is 3.11 or newer)
# PIP_FLAGS="..."              passed to every `pip install`
# RUN=runs/name                the folder of `make quickstart` (default: a new one, named by the time)

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# Stamps, so that set-up is one `stat` when nothing changed. The developer's set contains the user's.
RUNTIME := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-dev

TORCH_NPU := torch_npu==2.13.0
ASCEND := $(VENV)/ascend/.installed

# A .venv whose interpreter has gone is made again, stamps and all.
$(shell test -x $(BIN)/python || rm -f $(RUNTIME) $(DEVELOP))

CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help setup quickstart test test-device test-multi test-slow test-crash test-ascend lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: $(DEVELOP) ## make .venv with everything that the tests and the linters need

# The key is made for this run, or is the one that lies there; its public half is what others are given.
quickstart: $(RUNTIME) ## train a small model on generated tasks, seal and verify its evidence, report (minutes)
	$(BIN)/fullweight train recipes/quickstart.toml --output $(RUN)
	$(BIN)/fullweight seal $(RUN) --out $(RUN)/evidence $(if $(wildcard $(RUN).pem),--key,--new-key) $(RUN).pem
	$(BIN)/fullweight verify $(RUN)/evidence --public-key $(RUN).pem.pub --run $(RUN) --replay 1 \
	  --report $(RUN)/report.html
	@echo "run and weights:        $(RUN)"
	@echo "sealed evidence of it:  $(RUN)/evidence (signed with $(RUN).pem, which stays with you)"
	@echo "open in a browser:      $(RUN)/report.html"

test: $(DEVELOP) ## every test that takes seconds
	$(BIN)/python -m pytest -m "not slow and not crash" --ignore=tests/multi --ignore=tests/ascend $(PYTEST_FLAGS)

test-device: $(DEVELOP) ## the contract of devices, on the accelerator that is there, if one is, and on the CPU
	$(BIN)/python -m pytest tests/device $(PYTEST_FLAGS)

test-multi: $(DEVELOP) ## the tests with several ranks on this machine
	$(BIN)/python -m pytest -m "not slow and not crash" tests/multi $(PYTEST_FLAGS)

test-slow: $(DEVELOP) ## the tests that take longer
	$(BIN)/python -m pytest -m slow --ignore=tests/ascend $(PYTEST_FLAGS)

test-crash: $(DEVELOP) ## kill, damage, fill disks: the sweep over checkpoints (minutes)
	$(BIN)/python -m pytest -m crash tests/crash $(PYTEST_FLAGS)

# torch_npu is kept out of .venv: torch would import it, and want CANN, in every process.
ifeq ($(shell uname -sm),Linux x86_64)
test-ascend: $(ASCEND) ## the Ascend path against torch_npu itself, without an Ascend (Linux x86-64)
	@eval "$$($(BIN)/python tests/ascend/cann.py)" && $(BIN)/python -m pytest tests/ascend $(PYTEST_FLAGS)
else
test-ascend:
	@echo "test-ascend needs Linux on x86-64, for which PyPI has $(TORCH_NPU); this is $$(uname -sm)"
endif

lint: $(DEVELOP) ## ruff, mypy, and the rules on who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEVELOP) ## speed and memory of one training step, beside transformers
	$(BIN)/fullweight bench model

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on PATH may be a shim for a version that is absent, or a Python without venv: each candidate is run.
$(BIN)/python:
	@found=""; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	  if "$$candidate" -c '$(CHECK_PYTHON)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "fullweight needs Python 3.11 or newer with venv and ensurepip; tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python on PATH)." >&2; \
	  echo "Install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv), or name one: make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$found ($$("$$found" --version 2>&1))"; \
	"$$found" -m venv --clear $(VENV)

# torch first and alone: it is most of the download, and is kept when a later step fails.
$(RUNTIME): pyproject.toml | $(BIN)/python
	@echo "installing fullweight into $(VENV) (a minute or two from a nearby package index)"
	@$(PIP_INSTALL) "$$(sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(ASCEND): $(DEVELOP)
	@echo "installing $(TORCH_NPU) into $(VENV)/ascend"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/ascend "$(TORCH_NPU)"
	@touch $@

$(DEVELOP): $(RUNTIME)
	@echo "installing what tests and linters need"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@
