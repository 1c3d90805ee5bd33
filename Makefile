# Targets for people. `make help` lists them.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
DATA ?=
TASK ?= ards
RUN ?=
ARGS ?=
SITE ?= local
MAX ?= 8
IMAGE ?= raylab.sqsh
BASE ?=
WHEELHOUSE ?=
PREPARED = $(or $(DATA),prepared/$(TASK))
NAME = $(if $(RUN),--name "$(RUN)")
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: help setup wheelhouse demo prepare train tune transfer evaluate compare submit test test-slow test-slurm test-all test-faults test-sites soak \
  slurm-up slurm-down slurm-status check lock ui clean cluster-up cluster-status cluster-down site doctor cost notebook datalad-demo \
  image test-image
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready ## make .venv with every pinned dependency (WHEELHOUSE=DIR: without internet, from its wheels)

$(VENV)/.ready: requirements.lock pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" WHEELHOUSE="$(WHEELHOUSE)" bash scripts/setup.sh $(VENV)

wheelhouse: ## WHEELHOUSE=DIR: download every pinned wheel, to set up where there is no internet
	@PYTHON="$(PYTHON)" bash scripts/wheelhouse.sh "$(or $(WHEELHOUSE),wheelhouse)"

demo: setup ## the main job, end to end (DATA=DIR runs it on real data)
	@$(BIN)/python -m jobs.demo $(if $(DATA),--data "$(DATA)")

prepare: setup ## TASK=ards DATA=DIR: make the prepared directory DIR (synthetic; ARGS="--source ..." for yours)
	@$(BIN)/raylab prepare "$(TASK)" --out "$(PREPARED)" $(or $(ARGS),--source synthetic)

train: setup ## TASK=ards DATA=DIR RUN=NAME: train on a prepared directory (ARGS="--workers 1:2 --smoke")
	@$(BIN)/raylab train "$(TASK)" --data "$(PREPARED)" $(NAME) $(ARGS)

tune: setup ## TASK=ards DATA=DIR RUN=NAME: search hyperparameters (ARGS="--trials 8")
	@$(BIN)/raylab tune "$(TASK)" --data "$(PREPARED)" $(NAME) $(ARGS)

transfer: setup need-run ## TASK=covidnet DATA=DIR RUN=NAME: go on from the weights of run NAME on other data
	@$(BIN)/raylab transfer "$(TASK)" --from "$(RUN)" --data "$(PREPARED)" $(ARGS)

evaluate: setup need-run ## TASK=ards DATA=DIR RUN=NAME: score run NAME on the test split
	@$(BIN)/raylab evaluate "$(TASK)" --run "$(RUN)" --data "$(PREPARED)" $(ARGS)

compare: setup ## write the table of all runs and report.html
	@$(BIN)/raylab compare --out report.html $(ARGS)

datalad-demo: setup ## prepare and train under `datalad run`, then `datalad rerun` (needs datalad and git-annex)
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/datalad_demo.sh

submit: setup ## SITE=... TASK=ards DATA=DIR RUN=NAME: train on the Slurm cluster, brought up if there is none
	@$(BIN)/raylab cluster status >/dev/null 2>&1 || $(MAKE) --no-print-directory cluster-up
	@$(BIN)/raylab cluster submit -- python -m jobs.train "$(TASK)" --data "$(abspath $(PREPARED))" $(NAME) $(ARGS)

.PHONY: need-run
need-run:
	@test -n "$(RUN)" || { echo "raylab: which run? for example: make $(firstword $(MAKECMDGOALS)) RUN=first" >&2; exit 2; }

check: setup ## ruff and mypy
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy

# Two suites at a time, the longest first: those on Ray and Slurm wait as often as they compute. Beside the clusters only
# the unit tests run, and they have a low priority
SUITES := test-ray test-testbed test-mlflow check
CLUSTERS := tests/slurm/test_cluster.py tests/slurm/test_cluster_bad_days.py
PYTEST = $(BIN)/python -m pytest $(or $(SELECT),-m "not campaign")
TOGETHER = $(MAKE) --no-print-directory -j2

test: setup ## what a change must pass, under 15 minutes on 2 cores
	@$(TOGETHER) $(SUITES) test-unit SELECT='-m "not slow and not campaign"'

test-slow: setup ## the tests that take minutes each, but those on Slurm
	@$(PYTEST) -m "slow and not slurm and not campaign"

test-slurm: setup ## the tests on a Slurm cluster of this machine (root, Slurm's Debian packages)
	@$(PYTEST) tests/slurm

test-all: setup ## every test once, but the campaigns, which take minutes each
	@$(TOGETHER) $(SUITES)
	@$(TOGETHER) test-clusters test-unit

test-faults: setup ## every fault of the fault matrix on real Ray, Slurm and MLflow
	@$(BIN)/python -m pytest -m fault tests

test-sites: setup ## what `raylab doctor` says of twelve faults of foreign sites, each on a Slurm cluster of its own
	@$(BIN)/python -m pytest -m campaign tests/slurm/test_foreign_sites.py

soak: setup ## 50 small runs and two searches under random faults
	@RAYLAB_SOAK=50 $(PYTEST) -s tests/ray/test_soak.py

.PHONY: test-ray test-testbed test-mlflow test-clusters test-unit
test-ray test-mlflow: setup
	@$(PYTEST) tests/$(@:test-%=%)

test-testbed: setup
	@$(PYTEST) tests/slurm $(CLUSTERS:%=--ignore=%)

test-clusters: setup
	@$(PYTEST) $(CLUSTERS)

test-unit: setup
	@nice -n 10 $(PYTEST) -n 2 --dist loadfile tests/unit

image: setup ## IMAGE=raylab.sqsh: build the image of cluster/container without a daemon (BASE=IMAGE: on another base)
	@$(BIN)/python -m cluster.container.build $(if $(BASE),--base "$(BASE)") "$(IMAGE)"

test-image: setup need-image ## IMAGE=raylab.sqsh: steps, training, a submitted job and a search in it on a Slurm test cluster
	@RAYLAB_IMAGE="$(abspath $(IMAGE))" RAYLAB_TESTBED_SHARE="$(patsubst %/,%,$(dir $(abspath $(IMAGE))))" $(BIN)/python -m pytest tests/slurm/test_image.py

.PHONY: need-image
need-image:
	@test -f "$(IMAGE)" || { echo "raylab: there is no image $(IMAGE): make image" >&2; exit 2; }

slurm-up: setup ## start a Slurm cluster of three nodes on this machine (root, Slurm's Debian packages)
	@$(BIN)/python -m cluster.testbed up

slurm-down: setup ## end it and remove all of it
	@$(BIN)/python -m cluster.testbed down

slurm-status: setup ## its nodes and jobs
	@$(BIN)/python -m cluster.testbed status

cluster-up: setup ## a Ray cluster on Slurm (SITE=..., MAX=8)
	@$(BIN)/raylab cluster up --site "$(SITE)" --max "$(MAX)" --wait

cluster-status: setup ## its nodes, demand and jobs
	@$(BIN)/raylab cluster status

cluster-down: setup ## end it
	@$(BIN)/raylab cluster down

site: setup ## SITE=NAME: write a section of your own sites file from what Slurm says (ARGS="--partition P")
	@test "$(origin SITE)" != file || { echo "raylab: which name? for example: make site SITE=ours" >&2; exit 2; }
	@$(BIN)/raylab site new "$(SITE)" $(ARGS)

cost: setup ## what runs and idle nodes have cost (ARGS="--experiment raylab")
	@$(BIN)/raylab cost $(ARGS)

doctor: setup ## what of SITE fits raylab, and what to do about the rest
	@$(BIN)/raylab doctor --site "$(SITE)"

ui: setup ## open the MLflow pages of this directory's runs
	@$(BIN)/raylab ui

notebook: setup ## JupyterLab with raylab's kernel (SITE=...) and a copy of docs/notebook.ipynb
	@$(BIN)/raylab notebook --site "$(SITE)"
	@test -e raylab.ipynb || cp docs/notebook.ipynb raylab.ipynb
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(ARGS) raylab.ipynb

.PHONY: test-gpu
test-gpu: setup ## the tests that need an NVIDIA card; skipped without one
	@$(BIN)/python -m pytest tests/gpu

lock: setup ## pin again what pyproject.toml allows
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url --group dev --extra notebook pyproject.toml -o requirements.lock

clean: ## remove the environment and caches; runs in .raylab stay
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
