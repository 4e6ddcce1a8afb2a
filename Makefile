# Each target creates `.venv` if it is missing or if the list of packages has changed.
#
#   make quickstart   download images, train on two processes, evaluate
#   make test         all tests except those marked `long`
#   make lint         ruff, mypy and import-linter
#   make docs         build the documentation into site/; warnings are errors
#   make coverage     run the tests and show which lines of both packages they execute; htmlcov/
#   make env          only create the environment in .venv
#   make lock         renew requirements.lock: the newest versions that pyproject.toml allows
#   make stores       install an Azure emulator; without it, tests marked `az` are skipped
#
# PYTHON=python3.12 selects the interpreter for a new `.venv`.
# TEST_WORKERS=4 runs the tests in so many processes (default 2).
# TESTS='tests/unit -k loader' selects the tests of `make test` and `make coverage`.
# SLURM=no skips the installation of SLURM; its tests are then skipped.

PYTHON ?= python3
SLURM ?= yes
TEST_WORKERS ?= 2
TESTS ?= tests
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
RUN := $(VENV)/bin/python
LOCK := requirements.lock
EXTRAS := quickstart,dev,docs
STAMP := $(VENV)/.made-$(shell cat pyproject.toml setup.py $(LOCK) | cksum | tr ' ' '-')
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# torch is installed first, at the version pinned in pyproject.toml: other packages depend on any
# torch and would install the newest.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: help quickstart test coverage lint docs env lock system stores clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

env: $(STAMP)

$(STAMP): pyproject.toml setup.py $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; use a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV): takes a few minutes, mostly for torch"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) cannot create environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(RUN) $(PIP_INSTALL) --constraint $(LOCK) $(TORCH)
	$(RUN) $(PIP_INSTALL) --constraint $(LOCK) --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.made-*
	@touch $@

# From a new environment, because `.venv` may hold other packages. Without torch's build (`+cpu`),
# which depends on the package index. No hashes, which would bind the file to one platform.
lock:
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT \
		&& $(PYTHON) -m venv "$$new/env" && python="$$new/env/bin/python" \
		&& "$$python" $(PIP_INSTALL) $(TORCH) \
		&& "$$python" $(PIP_INSTALL) --editable '.[$(EXTRAS)]' \
		&& echo '# Versions that `make env` installs, as pip constraints. Made by `make lock`.' > "$$new/lock" \
		&& "$$python" -m pip freeze --exclude-editable | sed 's/+[^+]*$$//' >> "$$new/lock" \
		&& mv "$$new/lock" $(LOCK)

quickstart: env
	$(RUN) -m tools.quickstart

test: env system
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not long' -n $(TEST_WORKERS) $(TESTS)

# The report is written also if tests fail: under measurement some may exceed their time limits.
coverage: env system
	@$(RUN) -m coverage erase
	@status=0; OMP_NUM_THREADS=1 $(RUN) -m coverage run -m pytest -m 'not long' -n $(TEST_WORKERS) \
		$(TESTS) || status=$$?; \
	$(RUN) -m coverage combine --quiet && $(RUN) -m coverage report && $(RUN) -m coverage html --quiet; \
	echo "by line: htmlcov/index.html"; exit $$status

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: env
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

# SLURM is installed from system packages, which requires root. Otherwise its tests are skipped with
# a reason.
system:
	@if [ "$(SLURM)" = yes ] && [ "$$(id -u)" = 0 ]; then \
		bash tests/support/install_slurm.sh \
			|| { echo "error: SLURM could not be installed; skip it with: make test SLURM=no" >&2; exit 2; }; \
	fi

# Azure's emulator for tests marked `az`, from npm (190 MB).
stores: env
	$(RUN) -m tests.support.azure_server

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		htmlcov site .coverage .coverage.*
