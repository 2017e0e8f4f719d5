# What a newcomer and CI call. `make demo` and `make test` set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup data data_long demo demo_seeds demo_long ablations test check lint types unit jobs slurm kubernetes lock clean

help:           ## this list
	@grep -E '^[a-z_]+: .*##|^[a-z_]+:  +##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/.installed   ## .venv with everything, pinned

# Compiled once, here: where Python may not write its bytecode (PYTHONDONTWRITEBYTECODE, somebody else's folder), every
# process would compile torch anew, for two seconds.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dinoctl needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

data: setup     ## the demo's images, into ~/.cache/dinoctl
	$(BIN)/python -P -m model.data.stamps

data_long: data ## the longer demo's images, beside the demo's
	$(BIN)/python -P -m model.data.openclipart

demo: data      ## the main job, on real images: 7 minutes on 2 cores
	$(BIN)/dinoctl submit jobs/demo.yaml

demo_seeds: data  ## the main job with three seeds, and their tables in one
	$(BIN)/python -P -m tests.benchmarks.demo_seeds

demo_long: data_long  ## the same job with five times the steps and a wider network, and drawings beside the stamps: 40 minutes
	$(BIN)/dinoctl submit jobs/demo_long.yaml

ablations: data ## v1's, v2's and v3's ablations on small images, and their curves in runs/ablations.png
	$(BIN)/python -P -m tests.benchmarks.ablations

test: unit jobs ## every test that this machine can run

# Side by side: some tests wait.
check: setup    ## the quick part: a few minutes on 2 cores
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target lint types unit

lint: setup     ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup    ## mypy --strict on both houses and the dev cluster
	$(BIN)/mypy

unit: setup     ## tests that start no jobs, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m "not jobs" -n 2 --dist loadfile

# Three at a time on two cores: each cluster's tests, which often wait, are one process's, and the rest goes file by file.
jobs: setup     ## real torchrun jobs, killed and resumed, here and on a real Slurm and a real Kubernetes
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m jobs -n 3 --dist loadfile --no-loadscope-reorder --durations=20

slurm:          ## a real Slurm of two virtual nodes on this machine, as root (clusters/dev/slurm)
	clusters/dev/slurm/install
	clusters/dev/slurm/up

kubernetes: setup   ## a real Kubernetes on this machine, as root, with Go (clusters/dev/kubernetes)
	clusters/dev/kubernetes/install
	clusters/dev/kubernetes/up

lock: setup     ## pin today's newest versions again
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --all-extras --upgrade pyproject.toml -o constraints.txt

clean:          ## remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
