# The two commands: `make demo` runs the main job on data that needs no download, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest lint

demo: .venv/installed
	$(BIN)/calibquant demo

test: .venv/installed
	$(BIN)/pytest -n 2

# What other packages read, write or compute. `make test-lowest LOWEST=tests` runs all.
LOWEST ?= tests/cli tests/data tests/export tests/numerics
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest -n 2 $(LOWEST)

lint: .venv/installed
	$(BIN)/ruff format --check calibquant tests benchmarks examples
	$(BIN)/ruff check calibquant tests benchmarks examples
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q -c constraints-lowest.txt -e . pytest pytest-xdist hypothesis
	touch $@
