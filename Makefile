# The commands for working on the project. `make` without a target lists the commands.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export DS_BUILD_OPS := 0
export UV_PYTHON_DOWNLOADS := never
# uv uses the machine's certificates, as pip and Go do, because a company's proxy may have a certificate authority of its own.
export UV_SYSTEM_CERTS := 1
export FINETUNE_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
METHOD ?= lora
PYTHON := .venv/bin/python
HOST_PYTHON := $(or $(shell command -v python3.11),python3)
UV := $(FINETUNE_CACHE)/uv/bin/uv
PYTEST := $(PYTHON) -m pytest
# Python keeps what it has compiled, also where the shell says otherwise. Each process of the tests would compile the packages
# again, and each worker would rewrite the assertions of all tests.
unexport PYTHONDONTWRITEBYTECODE
# Two groups of tests (tests/conftest.py) run at the same time, because most tests with a cluster wait more than they compute.
TEST_WORKERS ?= 2
# The tests without a cluster wait for a fifth of their time, so three groups at a time keep two processors busy.
UNIT_WORKERS ?= 3
PARALLEL := --dist loadscope --no-loadscope-reorder

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: venv
venv: .venv/.ready ## Make the virtual environment (.venv) from the lock

# A minimal Debian has Python without the module venv. Only the package python3-venv is installed then, which needs root.
$(UV):
	@$(HOST_PYTHON) -m venv --clear $(FINETUNE_CACHE)/uv >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] || { echo "this Python has no module venv: run \`apt-get install python3-venv\` as root, then this command again"; exit 1; }; \
	  echo "installing python3-venv"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null 2>&1; \
	  $(HOST_PYTHON) -m venv --clear $(FINETUNE_CACHE)/uv; }
	@$(FINETUNE_CACHE)/uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r locks/uv.txt

.venv/.ready: $(UV) locks/dev.txt pyproject.toml
	@echo "installing the virtual environment (.venv) from locks/dev.txt"
	@$(UV) venv --quiet --allow-existing --python $(HOST_PYTHON) .venv
	@$(UV) pip sync --python $(PYTHON) --require-hashes locks/dev.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

.PHONY: lint
lint: venv ## Check style, types and import rules
	@.venv/bin/ruff check --output-format concise .
	@.venv/bin/ruff format --check --quiet . || { echo "run: .venv/bin/ruff format ."; exit 1; }
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

.PHONY: crds
crds: venv ## Generate crds/ and the chart's copy from the pydantic models
	@$(PYTHON) -m finetune_core.api.crd crds
	@$(PYTHON) -m finetune_core.api.crd --chart charts/finetune-operator/templates/crds

.PHONY: docs
docs: venv ## Generate docs/api.md, docs/tasks.md, the tables of docs/architecture.md, the alerts of docs/observability.md and the tables of docs/data.md, docs/gpu-check.md and docs/planning.md
	@$(PYTHON) -m finetune_core.api.reference docs
	@$(PYTHON) -m finetune_core.tasks_page docs
	@$(PYTHON) -m finetune_operator.decide.reference docs/architecture.md
	@$(PYTHON) -m tests.operator.test_observability_page
	@$(PYTHON) -m tests.trainer.test_published_rows
	@$(PYTHON) -m tests.trainer.test_families
	@$(PYTHON) -m tests.gpu.test_page
	@$(PYTHON) -m tests.planning.test_planning_page
	@$(PYTHON) -m tests.examples.test_study_pages

COMPILE := --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28

.PHONY: locks
locks: $(UV) ## Pin all dependencies with hashes and without index addresses
	@echo "uv" | $(UV) pip compile --quiet - $(COMPILE) -o locks/uv.txt >/dev/null
	@for extra in dev operator trainer cli bench; do \
	  constraint=$$([ $$extra = dev ] || echo "-c locks/dev.txt"); \
	  $(UV) pip compile --quiet pyproject.toml --extra $$extra $$constraint $(COMPILE) \
	    -o locks/$$extra.txt >/dev/null; done

.PHONY: cluster
cluster: venv ## Start a real cluster without the operator (make demo KEEP=1 has it) and print how to reach it with kubectl (NODES=2: two nodes; Ctrl-C ends it)
	@$(PYTHON) -m tests.cluster up --nodes $(or $(NODES),1)

.PHONY: images
images: venv ## Build the images of the operator and the trainer
	@$(PYTHON) -m tests.cluster images

# What a command says in its first line: how long it takes, and whether packages are left to install.
PACKAGES = $(if $(wildcard .venv/.ready),The packages are installed.,Before that the packages are installed: 3 GB are downloaded$(comma) .venv has 5.5 GB.)
comma := ,
announce = @echo "make $@ takes $(1) on two processors, longer on a slower machine. $(PACKAGES)"

.PHONY: try
try: ## Tune a small model on this machine, without root and without a cluster, and see its answers before and after
	$(call announce,about 4 minutes)
	@$(MAKE) --no-print-directory --silent venv
	@$(PYTHON) -m examples.tryout

.PHONY: demo
demo: ## Run the whole product on this machine without GPUs (METHOD=full: all parameters; KEEP=1: keep the cluster)
	$(call announce,about 5 minutes$(comma) and 10 more the first time$(comma) when it builds a Kubernetes$(comma))
	@$(MAKE) --no-print-directory --silent venv
	@$(PYTHON) -m examples.demo --method $(METHOD) $(if $(KEEP),--keep)

.PHONY: study
study: venv ## LoRA or every parameter? Twelve small jobs, compared; 70 min on two cores (STUDY_DATA=FOLDER: published rows; STUDY_STEPS=6: a trial)
	@$(PYTHON) -m examples.study $(if $(STUDY_DATA),--data $(STUDY_DATA)) $(if $(STUDY_STEPS),--steps $(STUDY_STEPS) --output out/study-trial)

.PHONY: unit
unit: venv ## Run the tests that need no cluster and no gang (ROOM=graders: all without a cluster of one folder of a package or of tests/)
	@files=$$($(if $(ROOM),$(PYTHON) -m tests.rooms $(ROOM))); \
	  $(PYTEST) -m "not cluster and not long $(if $(ROOM),,and not gang)" \
	    $(if $(ROOM),,--numprocesses $(UNIT_WORKERS) $(PARALLEL)) $$files

.PHONY: gang
gang: venv ## Run the tests that start the processes of a training
	@$(PYTEST) -m "gang and not cluster and not long" --numprocesses $(TEST_WORKERS) $(PARALLEL) tests/trainer

.PHONY: test
test: ## Run the linters, the unit tests, and the end-to-end tests on a real cluster
	$(call announce,about 30 minutes$(comma) and 15 more the first time$(comma) when it builds a Kubernetes$(comma))
	@$(MAKE) --no-print-directory --silent lint
	@$(PYTHON) -m tests.cluster prepare
	@$(PYTEST) -m "not long" --numprocesses $(TEST_WORKERS) $(PARALLEL) --durations 15

.PHONY: test-long
test-long: venv ## Run the tests that take many minutes
	@$(PYTEST) -m long --hypothesis-profile new-values
	@$(PYTEST) -m "not cluster and not long" --hypothesis-profile new-values $$(git grep -l "from hypothesis" -- "tests/**/test_*.py")

# This environment has the packages of .venv and the libraries that the trainer is compared with.
.venv-bench/.ready: $(UV) locks/bench.txt pyproject.toml
	@echo "installing the virtual environment of make bench (.venv-bench) from locks/bench.txt"
	@$(UV) venv --quiet --allow-existing --python $(HOST_PYTHON) .venv-bench
	@$(UV) pip sync --quiet --python .venv-bench/bin/python --require-hashes locks/bench.txt
	@$(UV) pip install --quiet --python .venv-bench/bin/python --no-deps --editable .
	@touch $@

.PHONY: bench
bench: .venv-bench/.ready ## Measure the project against alternatives (BENCH="--only NAME": one measurement)
	@.venv-bench/bin/python -m tests.bench $(BENCH)

# A machine with GPUs often has a Python of its own, with a torch that fits its driver.
GPU_PYTHON ?= $(or $(wildcard $(PYTHON)),python3)

.PHONY: gpu-check
gpu-check: ## Check the trainer on one GPU in at most 8 minutes (GPU_CHECK="--only NAME,...": some sections; "--dry": on the CPU)
	@PYTHONPATH=core:cli:operator:trainer_image$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m tests.gpu $(GPU_CHECK)
