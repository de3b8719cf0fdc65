# make setup  install what is pinned into .venv; the others below do it by themselves
# make run    set up, then run the whole pipeline on real data; options by ARGS, e.g. make run ARGS="--epochs 3"
# make up     start the whole stack here: S3, Prefect with a worker, three Ray nodes; make status, make down
# make test   set up, then run all tests
# make check  lint, format and types, as CI does
# make bench  measure against the textbook loop (10 minutes) and write docs/benchmarks.md
# make bench-data  measure the data plane against others' (5 minutes), into docs/data-benchmarks.md
# make bench-scale shard and stream 6 million images (15 minutes, 3 GB of disk), into docs/scale.md
# make bench-evaluate  judge and publish a model, by 10,000 and by a million images (5 minutes), into docs/evaluation.md
# make bench-scaling  images/s by workers and batch size (10 minutes), into docs/scaling.md
# make accuracy  the recipes over five seeds, and what each part is worth (1 hour), into docs/accuracy.md
# make faults kill workers, nodes and drivers 21 times (15 minutes), into docs/faults.md
# make hosts  as root: whole runs on four hosts in network namespaces, one cut off (12 minutes), into docs/hosts.md
# make drill  up, runs by Prefect, a schedule, ten runs at once, down: all by a script (20 minutes), into docs/stack.md
# make gpu-check  on a machine with a GPU: hold it to the CPU's results, and measure (5 minutes), into docs/gpu.md
# make parity compare with a plain PyTorch loop over seeds and worker counts (20 minutes), into docs/parity.md

PYTHON ?= python3
BIN := .venv/bin
# Bytecode is made on all cores, where pip takes one: 20,000 files, some of them templates that are no Python.
define install
$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint requirements.lock --editable '$(1)'
@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
@touch $@
endef
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Only root can make network namespaces, and not everywhere: elsewhere, its test is left out by name.
SPACES := $(shell unshare --net --uts --mount --pid --fork true 2>&1 && command -v ip || echo none)
NO_HOSTS := $(if $(filter none,$(SPACES)),--ignore tests/infra/test_hosts.py)
export PYTHONWARNINGS ?= ignore

.PHONY: setup run up status down test check format bench bench-data bench-scale bench-evaluate bench-scaling accuracy faults hosts gpu-check parity drill

setup: .venv/runs

run: .venv/runs
	@$(BIN)/lenet train $(ARGS)

up: .venv/stack
	@$(BIN)/python -m infra up $(ARGS)

status: .venv/stack
	@$(BIN)/python -m infra status $(ARGS)

down: .venv/stack
	@$(BIN)/python -m infra down $(ARGS)

test: .venv/tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(NO_HOSTS) $(ARGS)

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

bench-evaluate: .venv/tests
	$(BIN)/python -m tests.bench.evaluation

bench-scaling: .venv/tests
	$(BIN)/python tests/bench/scaling.py

accuracy: .venv/tests
	$(BIN)/python tests/bench/accuracy.py

faults: .venv/tests
	$(BIN)/python tests/bench/faults.py

hosts: .venv/tests
	$(BIN)/python -m tests.bench.hosts $(ARGS)

drill: .venv/tests
	$(BIN)/python -m tests.bench.stack

gpu-check: .venv/tests
	$(BIN)/python tests/bench/gpu.py

parity: .venv/tests
	$(BIN)/python tests/bench/parity.py

.venv/runs: pyproject.toml requirements.lock lenet/convolution.c
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python 3.11 or newer is needed; name one: make $(or $(MAKECMDGOALS),run) PYTHON=python3.11")'
	@echo "setting up .venv (about 3 minutes the first time; PyTorch is large)"
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')")' 2>/dev/null || rm -rf .venv
	$(PYTHON) -m venv .venv
	$(call install,.)

.venv/stack: .venv/runs
	$(call install,.[stack])

.venv/tests: .venv/runs
	@{ command -v gcc && { command -v chromium || command -v chromium-browser || command -v google-chrome; }; } >/dev/null || \
		{ $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium gcc libc6-dev; }
	$(call install,.[dev])

.venv/bench: .venv/tests
	$(call install,.[bench])
