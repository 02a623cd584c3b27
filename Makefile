# make setup | demo [SEED=1] [ARGS="key=value …"] | test | test-cluster | lint

PYTHON ?= python3
SEED ?= 1
BIN := .venv/bin

.PHONY: setup demo test test-cluster lint

setup: .venv/.ready

.venv/.ready: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: setup
	$(BIN)/python rl.py config=configs/rl_tiny.yaml experiment.project=demo training.seed=$(SEED) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-cluster: setup  # two hosts as network namespaces: needs root, iproute2, openssh-server
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/cluster -m cluster -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
