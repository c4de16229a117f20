# The two commands: `make demo` runs the main job on data that needs no download, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/calibquant demo

test: .venv/installed
	$(BIN)/pytest -n 2

lint: .venv/installed
	$(BIN)/ruff format --check calibquant tests benchmarks examples
	$(BIN)/ruff check calibquant tests benchmarks examples
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
