# make setup | demo [SEED=1] [ARGS="key=value …"] | test | lint

PYTHON ?= python3
SEED ?= 1
BIN := .venv/bin

.PHONY: setup demo test lint

setup: .venv/.ready

.venv/.ready: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: setup
	$(BIN)/python rl.py config=configs/rl_tiny.yaml experiment.project=demo training.seed=$(SEED) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
