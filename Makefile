# make run: install, train for one quadrant, print the table.   make test: the whole suite.   make test-cuda: what needs a GPU.   make check: ruff and mypy.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-cuda check clean

run: .venv/run
	if [ -e runs/q1 ]; then $(BIN)/python train.py --resume q1; else $(BIN)/python train.py --quadrants 1; fi
	$(BIN)/python eval.py --runs runs/q1 --figure runs/q1/completions-test.png

test: .venv/test
	$(BIN)/python -m pytest

test-cuda: .venv/test
	$(BIN)/python -m pytest -m cuda -rs

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp per set of packages, made anew when setup.cfg changes.
.venv/run: EXTRA =
.venv/test: EXTRA = [test]
.venv/dev: EXTRA = [test,dev]
.venv/run .venv/test .venv/dev: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --editable '.$(EXTRA)'
	touch $@
