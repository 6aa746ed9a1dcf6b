# Python 3.11 or newer, pip and make are all that a machine needs; everything else goes into .venv.

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

.PHONY: help install report docs test test-quick test-slow gpu-test check format clean
.DEFAULT_GOAL := help

help:
	@echo "make report      write report.html about the demo model"
	@echo "make docs        build the documentation into site/, which opens without a server"
	@echo "make test        run all tests, quick ones first (PYTEST_ARGS='-k heads')"
	@echo "make test-quick  run the quick tests only, two at a time (WORKERS=8 for more)"
	@echo "make gpu-test    run the tests of the kernels on this machine's GPU, with PYTHON as it is"
	@echo "make check       ruff, its formatter and pyright over everything"
	@echo "make format      let ruff rewrite what it can"
	@echo "make clean       remove .venv, report.html, site and caches"
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made from."

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

test: test-quick test-slow

# several at a time, each with one thread; the slow ones time what they do, and have the machine to themselves
test-quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) -m "not slow"

# pytest ends with 5 when PYTEST_ARGS leaves no slow test over
test-slow: $(INSTALLED)
	$(PYTEST) -m slow || [ $$? -eq 5 ]

# no environment of its own: the torch and triton of a GPU machine are those that must work; only tests/kernels is loaded
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
	rm -rf $(VENV) report.html site build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find interp tests benchmarks notebooks docs -name __pycache__ -prune -exec rm -rf {} +
