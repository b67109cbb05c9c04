# `make demo` and `make test` set themselves up in .venv; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 2

.PHONY: demo test slow lint format table clean

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d; use make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# threads that wait spin for some microseconds and then give their core away: asleep at once, two are slower than one; spinning
# on, they bring a busy machine to a standstill
demo: .venv  ## distil the demo teacher into an LCM-LoRA and show what it can do at 8, 4, 2, 1 steps
	GOMP_SPINCOUNT=10000 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(THREADS) recipes/lcm_lora.py --train.resume_from_checkpoint latest $(ARGS)

# a process a core, each on one thread; a file's tests stay in one process, since they share what its fixtures made
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadfile

test: .venv  ## all quick tests
	$(PYTEST) $(ARGS)

slow: .venv  ## all tests
	$(PYTEST) -m 'slow or not slow' $(ARGS)

lint: .venv  ## style, imports, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

table: .venv  ## writes the README's results table from benchmarks/results
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf .venv out .pytest_cache .ruff_cache .mypy_cache
