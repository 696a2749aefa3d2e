# Each target makes the environment first if it is missing. Variables: PYTHON (3.11 to 3.13), VENV.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := deploy/requirements/cpu.txt
TASKS := deploy/requirements/tasks.txt
# CPU builds of torch come from a folder that pip is told of, if it has one, else from PyTorch's CPU index.
LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
TORCH := $(if $(wildcard $(LINKS)/torch-*+cpu-*.whl),--find-links $(LINKS),--torch-backend cpu)

.PHONY: setup demo demo-plain demo-real demo-grpo browser test test-long test-fast lint format docs
.PHONY: bench-algorithms bench-head bench-staleness bench-variance

setup: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode $(TORCH) -r $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

models/tiny: | setup
	$(BIN)/align models tiny $@

models/smollm2: | setup
	$(BIN)/align models smollm2 $@

models/smollm2-4bit: | models/smollm2
	$(BIN)/align models round models/smollm2 $@ --bits 4

demo: setup models/tiny
	$(BIN)/align train deploy/runs/demo.toml

demo-plain: setup models/tiny
	$(BIN)/align train deploy/runs/plain.toml

demo-real: setup models/smollm2 models/smollm2-4bit
	$(BIN)/align train deploy/runs/smollm2_heal.toml

demo-grpo: setup models/smollm2
	$(BIN)/align train deploy/runs/smollm2_addition.toml

bench-algorithms: setup models/tiny
	$(BIN)/python -m tests.bench.algorithms

# For the tests of pages: Debian's, where this may install it; elsewhere those tests are skipped, with the command to run.
browser:
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
	  test "$$(id -u)" = 0 && apt-get -q update && apt-get -qy install --no-install-recommends chromium chromium-driver; \
	} || echo "no browser for the tests of pages; as root: apt-get install chromium chromium-driver"

# The extra `tasks` (reasoning-gym), which compiles one of its packages; where it cannot, its tests are skipped.
$(VENV)/.tasks: $(TASKS) | setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r $(TASKS) && touch $@ || \
	  echo "no reasoning-gym for its tests: it needs a C compiler and Python's headers"

test: test-fast browser
	$(BIN)/python -m pytest -m "integration and not long"

test-long: setup browser $(VENV)/.tasks
	$(BIN)/python -m pytest -m long

test-fast: setup $(VENV)/.tasks
	$(BIN)/python -m pytest -m "not integration" --numprocesses 2 --dist loadfile

bench-head: setup
	$(BIN)/python -m tests.bench.head

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m tests.docs

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-variance: setup
	$(BIN)/python -m tests.bench.variance

bench-staleness: setup models/tiny
	$(BIN)/python -m tests.bench.staleness
