# Two commands set up a fresh machine: `make demo` and `make test`. They need Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help install demo test test-all test-faults test-versions gpu check docs reproduce \
	mixtures early-stopping base

help:
	@echo "make install    deradiff and what its tests need, into .venv"
	@echo "make demo       install, then train, realign and report on the shapes world (minutes)"
	@echo "make test       install, then the default tests"
	@echo "make test-all   the slow tests too"
	@echo "make gpu        every check that needs a GPU, in eight minutes; it installs nothing"
	@echo "make test-faults  kills, full disks, spoilt files, pulled cables, and what became of them"
	@echo "make test-versions  the default tests with the oldest and newest packages and Pythons"
	@echo "make check      lint, format and types"
	@echo "make docs       the documentation as a site in site/"
	@echo "make reproduce  the paper's experiment on the shapes world: six betas from scratch"
	@echo "make mixtures   two anchors of two rewards, mixed, on the shapes world"
	@echo "make early-stopping  checkpoints of a training, or lambda of its last one"
	@echo "make base       train the shapes world's base model and scorers, compared with the shipped"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deradiff needs Python 3.11 or newer: type make PYTHON=<path of one>"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

# What demo's anchors and sample runs are called
ANCHOR_500 := runs/train/shapes-dpo-lora-beta500-seed0/anchor
ANCHOR_2000 := runs/train/shapes-dpo-lora-beta2000-seed0/anchor
SAMPLES_500 := runs/sample/shapes-dpo-lora-beta500-seed0-exact-euler_ancestral
SAMPLES_2000 := runs/sample/shapes-dpo-lora-beta2000-seed0-exact-euler_ancestral

demo: install
	$(RUN) -m train --multirun dpo.beta=500,2000
	$(RUN) -m sample anchor=$(ANCHOR_500) lambdas=[0,0.25,0.5,1,2]
	$(RUN) -m sample anchor=$(ANCHOR_2000) lambdas=[0,1]
	$(RUN) -m eval name=demo select.score=vivid samples=[$(SAMPLES_500),$(SAMPLES_2000)]

test: install
	$(RUN) -m pytest

test-all: install
	$(RUN) -m pytest -m "slow or not slow"

test-faults: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n 0 tests/faults

test-versions:
	$(PYTHON) -m benchmarks.versions

# Without the network: the Python of .venv where there is one, else that of the machine.
gpu:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(RUN) -m mkdocs build

reproduce: install
	PYTHON=$(RUN) bash examples/reproduce.sh

mixtures: install
	PYTHON=$(RUN) bash examples/mixtures.sh

early-stopping: install
	PYTHON=$(RUN) bash examples/early_stopping.sh

base: install
	$(RUN) -m train experiment=shapes_clip
	$(RUN) -m train experiment=shapes_vae
	$(RUN) -m train experiment=shapes_base
	$(RUN) -m train experiment=shapes_pickscore
	$(RUN) -m train experiment=shapes_hpsv2
	$(RUN) -m benchmarks.shapes_assets compare
