# A machine needs Python 3.11 or newer, pip and make; everything else is installed into .venv.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
WORKERS ?= 2

# threads that wait must not spin: it makes small machines several times slower
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install report docs test test-fast test-quick test-slow test-durations gpu-test check format clean
.DEFAULT_GOAL := help

help:
	@echo "make report      write report.html about the demo model"
	@echo "make docs        build the documentation into site/, which opens without a server"
	@echo "make test-fast   run the tests most likely to fail, for less than a minute"
	@echo "make test        run all tests, quick ones first, and print their coverage (PYTEST_ARGS='-k heads')"
	@echo "make test-quick  run the quick tests only, in two processes (WORKERS=8 for more)"
	@echo "make gpu-test    run the tests of the kernels on the GPU of this machine, with the packages of PYTHON"
	@echo "make check       run ruff, its formatter and pyright on all files"
	@echo "make format      apply the fixes and the format of ruff"
	@echo "make clean       remove .venv, reports, the built site and caches"
	@echo "PYTHON=python3.12 chooses the interpreter for .venv."

install: $(INSTALLED)

# torch goes first and alone, so that what depends on it finds the build that this machine has
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found: name one with PYTHON=..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

report: $(INSTALLED)
	$(BIN)/interp report -o report.html

# strict: a warning is an error; the variable silences the theme's own news
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the figure is the share of lines that the quick tests run; slow tests are not traced, which would make them slower
test: COVERAGE := --cov=interp --cov-report=
test: test-quick test-slow
	@echo "coverage of interp by the quick tests: $$($(BIN)/coverage report --format=total) %"

# several processes with one thread each: small machines waste time on threads that wait for each other
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)
QUICK := $(PARALLEL) -m "not slow"

test-quick: $(INSTALLED)
	$(QUICK) $(COVERAGE)

# tests/helpers/fast_tests.py selects the tests and stops after this number of seconds
test-fast: $(INSTALLED)
	$(QUICK) --failed-first --fast 50

# update the durations by which test-fast selects
test-durations: $(INSTALLED)
	$(QUICK) --record-durations

# pytest exits with 5 when PYTEST_ARGS selects no slow test
test-slow: $(INSTALLED)
	$(PARALLEL) -m slow || [ $$? -eq 5 ]

# this uses the torch and triton that the GPU machine already has, and loads tests/kernels only
gpu-test:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found: name one with PYTHON=..."; exit 1; }
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/kernels -m "not interpreter" --confcutdir=tests/kernels \
		-o addopts="--import-mode=importlib -ra" --durations=15 $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) report.html report-run site build tests/build *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis
	find interp tests benchmarks notebooks docs -name __pycache__ -prune -exec rm -rf {} +
