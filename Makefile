# Everything starts here. `make race` and `make test` set up what is missing, then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: race bench test test-slow sanitize other-torch lint setup clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

race: setup  ## the main job: steps and seconds that batch normalization saves, on real images
	$(BIN)/batchnorm race

bench: setup  ## our layers beside torch's on this machine
	$(BIN)/batchnorm bench

test: setup lint  ## all tests that end within minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 BATCHNORM_TRITON_ON_CPU=1 $(BIN)/python -m pytest -n auto tests/ops/test_cuda.py

test-slow: setup  ## the tests that take long
	$(BIN)/python -m pytest -m slow
	TRITON_INTERPRET=1 BATCHNORM_TRITON_ON_CPU=1 $(BIN)/python -m pytest -n auto -m slow tests/ops/test_cuda.py

sanitize: setup  ## the kernels' tests under the address and undefined-behaviour sanitizers
	BATCHNORM_SANITIZE=1 $(BIN)/python setup.py --quiet build_py --build-lib build/sanitize/lib \
	  build_ext --force --build-lib build/sanitize/lib --build-temp build/sanitize
	PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/ops/test_kernels.py -k "anything or cut_into or every_fusion or update or misleads or past_the_caches or refuse or split"

other-torch: setup  ## the same shared object under another torch: make other-torch TORCH=2.10.0 (gigabytes, as it comes with CUDA)
	$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) numpy pytest pytest-timeout hypothesis expecttest onnx onnxscript onnxruntime safetensors transformers monai
	PYTHONPATH=$(CURDIR)/src build/torch-$(TORCH)/bin/python -m pytest tests/ops tests/nn tests/surgery tests/test_functional.py tests/test_transforms.py tests/test_torch_parity.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/ready  ## virtual environment with the pinned dependencies; quick when there is nothing to do

$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard src/batchnorm/ops/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "batchnorm needs Python 3.10 or later; name one with: make PYTHON=python3.12")'
	@# Debian ships venv apart from python3.
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "python3-venv is missing; installing it through apt"; \
	  apt-get update -qq && apt-get install -y -qq python3-venv; } || { \
	  echo "make setup: this Python has no venv. Install it first: sudo apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The CPU kernels need a C++ compiler; without one the package still works, on torch's kernels.
	@command -v g++ >/dev/null || { \
	  echo "g++ is missing; installing it through apt"; \
	  apt-get update -qq && apt-get install -y -qq g++; } || \
	  echo "make setup: no C++ compiler, so batchnorm runs on torch's own kernels (slower): sudo apt-get install g++" >&2
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build src/*.egg-info src/batchnorm/ops/*.so .mypy_cache .pytest_cache .ruff_cache
