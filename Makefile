# `make demo` and `make test` do their own set-up; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
APPS := $(VENV)/apps/.installed
WORKERS ?= auto
MINUTES ?= 10
# `make test AGAIN=2`: up to two tests that failed run once more, alone, and are named (tests/again.py).
AGAIN ?= 0
TARGET ?=
# `make packages VERSION=1.2.3 DIST=folder KEY=gpg-key-id`: pyproject's version, dist and no signature otherwise.
DIST ?= dist
VERSION ?=
KEY ?=

# Programs that `make test` runs against, and the Debian packages that bring them.
PACKAGES := postgresql postgresql-client openssh-client openssh-server openssh-sftp-server rsync git tmux vim-tiny procps asciinema strace faketime curl chromium nginx python3-venv \
	systemd-container debootstrap iproute2 nftables gpg gpg-agent gpgv openssl lintian rpmlint rpm wrk

.PHONY: help demo demo-up check test lint format hosts bench fuzz audit packages lock packages-installed clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed (PYTHON=... names another one)" >&2; exit 1; }
	@echo "==> setting up $(VENV) with everything from pyproject.toml: about a minute"
	@$(PYTHON) -m venv $(VENV) || { echo "error: python3 -m venv failed" >&2; echo "HINT: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(APPS): tests/apps.txt | $(STAMP)
	@echo "==> setting up $(VENV)/apps with everything from tests/apps.txt"
	@$(PYTHON) -m venv $(VENV)/apps
	@$(VENV)/apps/bin/python -m pip install --quiet --disable-pip-version-check -r tests/apps.txt
	@touch $@

demo: $(STAMP) ## the whole product once, on this machine: a psql query, recorded and replayed (about a minute)
	@$(BIN)/python tests/demo/demo.py

demo-up: $(STAMP) ## the same, left running for you to try, until Ctrl-C
	@$(BIN)/python tests/demo/demo.py --up

check: $(STAMP) lint ## lint and the fast tests: no root, under 3 minutes; for every commit
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow and not root'

packages-installed:
	@missing=""; for package in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then echo "==> installing$$missing"; export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "error: these Debian packages are missing:$$missing" >&2; echo "HINT: sudo apt-get install$$missing" >&2; exit 1; fi

test: ## everything: lint, unit and end-to-end tests against real servers, six real hosts (about an hour on two cores)
	@echo "==> make test: sets up $(VENV); installs (as root) or asks for: $(PACKAGES); then runs about an hour on two cores"
	@$(MAKE) --no-print-directory packages-installed
	@$(MAKE) --no-print-directory $(STAMP) $(APPS) lint
	@# The hosts are tried after a failure, too: one run tells all there is to mend.
	@trap "exit 130" INT; failed=0; \
	$(BIN)/python tests/again.py $(AGAIN) -- $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --ignore=tests/hosts || failed=1; \
	$(BIN)/python -m pytest -q tests/hosts || failed=1; \
	exit $$failed

lint: $(STAMP) ## ruff, mypy --strict, import-linter, ansible-lint
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 20
	@cd ansible && LC_ALL=C.UTF-8 ../$(BIN)/ansible-lint --offline -q --nocolor

format: $(STAMP) ## let ruff format and sort
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

bench: packages-installed $(STAMP) ## ratios: direct, OpenSSH double tunnel, and the chain, in one run
	@$(BIN)/python tests/bench/bench.py

hosts: packages-installed $(STAMP) ## the bundle installed by Ansible on six real systemd hosts, as root (about 25 minutes)
	@$(BIN)/python -m pytest -q tests/hosts

fuzz: $(STAMP) ## fuzz the readers of untrusted bytes, MINUTES=10 for each target or for one (TARGET=tokens)
	@$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) $(TARGET)

audit: $(STAMP) ## known vulnerabilities of the dependencies (needs an advisory source)
	@$(BIN)/pip-audit --skip-editable

packages: $(STAMP) ## .deb and .rpm of all parts, their checksums and SBOMs, in dist (about a minute)
	@PYTHONPATH=packaging $(BIN)/python -m pam_packages build --out '$(DIST)' --version '$(VERSION)' --key '$(KEY)'

lock: $(STAMP) ## resolve the packages' dependencies anew, into packaging/lock
	@PYTHONPATH=packaging $(BIN)/python -m pam_packages lock

clean: ## remove what the targets above made in this folder
	@rm -rf $(VENV) .demo .bench .fuzz .packaging dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
