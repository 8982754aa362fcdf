# make demo: the digits demo; make test: linters, tests and README blocks. Both from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo-installed
	$(BIN)/python -m gold_trainer demo

test: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.venv/demo-installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[demo]'
	touch $@

.venv/dev-installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
