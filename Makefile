# make setup | demo [SEED=1] [ARGS="key=value …"] | test | test-cluster | gpu [ARGS="--parts …"] | lint

PYTHON ?= python3
SEED ?= 1
BIN := .venv/bin

.PHONY: setup demo test test-cluster gpu lint

setup: .venv/.ready

# of pip's output: what requirements.txt names, downloads of 10 MB and more, and the last step
SHOWN := /->/!s/^Collecting \([^ ]*==[^ ]*\).*/\1/p ; /->/!s/^Processing .*\/\([^ ]*\).*/\1/p
SHOWN += ; s/^ *Downloading \(.*([0-9][0-9][0-9.]* MB)\)/  \1/p ; s/^ *Downloading \(.* GB)\)/  \1/p
SHOWN += ; s/^Installing collected.*/writing all of them to .venv, a minute or two/p

.venv/.ready: SHELL := /bin/bash
.venv/.ready: .SHELLFLAGS := -o pipefail -c
.venv/.ready: requirements.txt
	@echo "setup, once: some 165 packages into .venv, a few minutes; 2.5 GB on disk, more with CUDA"
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off -r requirements.txt | sed -un '$(SHOWN)'
	@touch $@
	@echo "setup is done"

# a demo of the same seed and without ARGS that was stopped, goes on: it has a checkpoint and no summary
RESUME = $(if $(and $(wildcard runs/demo/ckpt/step-*),$(if $(ARGS)$(wildcard runs/demo/summary.json),,yes),\
    $(shell grep -x '  seed: $(SEED)' runs/demo/config.yaml)),experiment.start_from_scratch=False)

demo: setup
	@echo "finetunes a tiny model on sums, where it is not there yet, until nearly half of its answers are right;"
	@echo "then 60 steps of TraceRL improve it: 3 to 6 minutes on two idle cores. Ctrl-C stops it, make demo goes on."
	$(BIN)/python rl.py config=configs/rl_tiny.yaml experiment.project=demo training.seed=$(SEED) $(RESUME) $(ARGS)
	@echo "your own tasks, reward or strategy, on this model: docs/tiny.md"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-cluster: setup  # two hosts as network namespaces: needs root, iproute2, openssh-server
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/cluster -m cluster -rs

# on a GPU, 25 minutes at most: its tests and benchmarks, to docs/gpu/ and docs/performance.md. Without .venv the
# image's own Python runs it, with torch and what else it has.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
