# Commands. Each makes `.venv` in the checkout when it is missing or when the list of
# packages has changed, and starts at once when it is there.
#
#   make quickstart   real pictures, two processes, a trained model, its scores and captions
#   make test         every test but those marked `long`
#   make lint         ruff, mypy and import-linter
#   make env          only the environment, in .venv
#   make stores       an Azure server for the tests marked `az`, which are skipped without it
#
# PYTHON=python3.12 chooses the interpreter for a new `.venv`.
# SLURM=no leaves out the installation of SLURM (its tests are then skipped).

PYTHON ?= python3
SLURM ?= yes
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.made-$(shell cat pyproject.toml setup.py | cksum | tr ' ' '-')
# The pin stands in pyproject.toml; torch goes first, because other packages ask for "any torch"
# and would bring the newest.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: help quickstart test lint env system stores clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

env: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "making $(VENV): a minute or a few, most of it torch"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[quickstart,dev]'
	@rm -f $(VENV)/.made-*
	@touch $@

quickstart: env
	$(RUN) -m tools.quickstart

test: env system
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not long'

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# SLURM comes from the system's packages, and only root can install those. Elsewhere the tests that
# need it are skipped and say so.
system:
	@if [ "$(SLURM)" = yes ] && [ "$$(id -u)" = 0 ]; then \
		bash tests/support/install_slurm.sh \
			|| { echo "error: SLURM could not be installed; 'make test SLURM=no' goes without" >&2; exit 2; }; \
	fi

# Servers of other stores for the tests marked `az`: Azure's emulator comes from npm (190 MB).
stores: env
	$(RUN) -m tests.support.azure_server

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
