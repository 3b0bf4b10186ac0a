# Everything lives in .venv. Needed: python3 (3.11 to 3.13), python3-venv, make, git. No root.

PYTHON ?= python3
ARGS   ?=
N      ?= 200
JOBS   ?= 2

VENV := .venv
BIN  := $(VENV)/bin
LOCK := requirements-dev.lock
DONE := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo run test test-others soak check format docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DONE) ## Install into .venv; the others do it by themselves when it is due
	@echo 'Ready. What there is: make help, .venv/bin/nameko, .venv/bin/queuectl'

demo: $(DONE) ## Sign 30 people up, and show what became of each event
	@$(BIN)/python -m services.demo $(ARGS)

run: $(DONE) ## Start the four services, and leave them running
	@$(BIN)/python -m services.demo run $(ARGS)

# Most tests wait for other processes, so four parts at once take little longer than one. The
# first of these take longest; of tests/flow each has the files whose names begin so.
PARTS := others flow-d flow-r flow-e-n flow-a-c flow-o-p faults flow-q flow-s-z

test: $(DONE) ## Run the tests, in parts at once; root gets the servers installed; ARGS='-k company' runs those
ifeq ($(ARGS),)
	@tests/support/servers.sh
	@$(MAKE) --no-print-directory --keep-going -j4 $(PARTS:%=test-%)
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-flow-%: $(DONE)
	@$(BIN)/python -m pytest tests/flow/test_[$*]*.py

test-faults: $(DONE)
	@$(BIN)/python -m pytest tests/faults

test-others: $(DONE)
	@$(BIN)/python -m pytest --ignore tests/flow --ignore tests/faults

soak: $(DONE) ## Break N things while events flow, and account for them, JOBS runs at a time; SEED chooses the same
	@$(BIN)/python -W ignore -m tests.faults.soak --faults $(N) $(if $(SEED),--seed $(SEED)) \
		--jobs $(JOBS) --receipt docs/receipts/soak.md

check: $(DONE) ## Check format, style, types, and which way imports run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DONE) ## Bring the code into the house's format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(DONE) ## Draw anew what in docs/ is drawn from the code
	$(BIN)/python -W ignore -m tests.support.capabilities

lock: $(DONE) ## Renew both lock files, within the ranges of pyproject.toml
	$(PIP_INSTALL) 'uv>=0.9'
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --output-file $(LOCK) --extra dev --constraints requirements.lock

clean: ## Remove .venv and what the tools left behind; data in var/ stays
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# nameko-sqlalchemy comes as source only. It is built with the lock's setuptools, which
# therefore goes first: nothing that the lock does not name is fetched or run.
$(DONE): $(LOCK) pyproject.toml
	$(call need,command -v $(PYTHON),$(PYTHON) was not found)
	$(call need,$(PYTHON) -c '$(IS_FIT)',$(PYTHON) is not Python 3.11 to 3.13)
	$(call need,$(PYTHON) -c 'import ensurepip',$(PYTHON) cannot make a virtual environment)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing into $(VENV), which takes a minute ...'
	@sed -n '/^setuptools==/,/[^\]$$/p' $(LOCK) | $(PIP_INSTALL) --require-hashes -r /dev/stdin
	@$(PIP_INSTALL) --require-hashes --no-build-isolation --use-pep517 -r $(LOCK)
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

IS_FIT = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

PIP_INSTALL = $(BIN)/python -m pip --disable-pip-version-check install -qq

# One lock for every Python and platform: markers, instead of what this machine needs. It
# names no index, so that it holds for PyPI and for its mirrors.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal \
	--python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links

# $(call need,command,what is wrong if it fails)
define need
@$(1) >/dev/null 2>&1 || { \
	echo 'Error: $(2).' >&2; \
	echo 'On Debian and Ubuntu: apt install python3 python3-venv.' >&2; \
	echo 'Another Python is named so: make setup PYTHON=python3.12' >&2; \
	exit 1; \
}
endef
