# Two commands do everything: `make train` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train test lint clean

train: .venv/run   ## install, train the quick preset, evaluate it
	$(BIN)/python trainer.py --preset quick
	$(BIN)/python utils.py --checkpoint outputs/best_checkpoint.pt

test: .venv/dev    ## install, lint, test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
