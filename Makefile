# Every command a person needs; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export DS_BUILD_OPS := 0
METHOD ?= lora
PYTHON := .venv/bin/python
PACKAGES := core cli operator trainer_image
UV = python3 -m uv

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: venv
venv: .venv/.ready ## Make the virtual environment from the lock

.venv/.ready: locks/dev.txt pyproject.toml
	@$(UV) --version >/dev/null 2>&1 || python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore uv
	@echo "installing the virtual environment (.venv) from locks/dev.txt"
	@$(UV) venv --quiet --allow-existing --python python3.11 .venv
	@$(UV) pip sync --python $(PYTHON) --require-hashes locks/dev.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

.PHONY: lint
lint: venv ## Style, types, import rules
	@.venv/bin/ruff check --output-format concise .
	@.venv/bin/ruff format --check --quiet . || { echo "run: .venv/bin/ruff format ."; exit 1; }
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

.PHONY: crds
crds: venv ## Generate crds/ and the chart's copy from the pydantic models
	@$(PYTHON) -m finetune_core.api.crd crds
	@$(PYTHON) -m finetune_core.api.crd --chart charts/finetune-operator/templates/crds

.PHONY: locks
locks: ## Pin all dependencies with hashes and without index addresses
	@for extra in dev operator trainer cli; do \
	  constraint=$$([ $$extra = dev ] || echo "-c locks/dev.txt"); \
	  $(UV) pip compile --quiet pyproject.toml --extra $$extra $$constraint --generate-hashes --no-emit-index-url --no-annotate \
	    --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 -o locks/$$extra.txt >/dev/null; done
