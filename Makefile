# make run    set up, then run the whole pipeline on real data; options by ARGS, e.g. make run ARGS="--epochs 3"
# make test   set up, then run all tests
# make check  lint, format and types, as CI does
# make bench  measure against the textbook loop (10 minutes) and write docs/benchmarks.md
# make bench-data  measure the data plane against others' (5 minutes), into docs/data-benchmarks.md
# make bench-scale shard and stream 6 million images (15 minutes, 3 GB of disk), into docs/scale.md
# make parity compare with a plain PyTorch loop over seeds and worker counts (20 minutes), into docs/parity.md

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock
export PYTHONWARNINGS ?= ignore

.PHONY: run test check format bench bench-data bench-scale parity clean

run: .venv/runs
	@$(BIN)/lenet train $(ARGS)

test: .venv/tests
	$(BIN)/python -m pytest $(ARGS)

check: .venv/tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/tests
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/tests
	$(BIN)/python tests/bench/speed.py

bench-data: .venv/bench
	$(BIN)/python tests/bench/data.py

bench-scale: .venv/tests
	$(BIN)/python tests/bench/scale.py

parity: .venv/tests
	$(BIN)/python tests/bench/parity.py

clean:
	rm -rf .venv

.venv/runs: pyproject.toml requirements.lock
	@echo "setting up .venv (about 3 minutes the first time; PyTorch is large)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/tests: .venv/runs
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/bench: .venv/tests
	$(PIP) --editable '.[dev,bench]'
	@touch $@
