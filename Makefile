# Each target makes its own virtual environment in .venv and installs all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Nothing here may reach a model hub, and one thread per process keeps numbers and timings repeatable.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS := 1

.PHONY: install demo test test-slow lint bench quality clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation --editable '.[dev,genai,gguf]'
	touch $@

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p moec

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

quality: $(STAMP)
	$(BIN)/python -W ignore::FutureWarning -m tests.quality
	$(BIN)/python -W ignore::FutureWarning -m tests.quality.dense_to_moe
	$(BIN)/python -W ignore::FutureWarning -m tests.quality.packed_experts
	$(BIN)/python -W ignore::FutureWarning -m tests.quality.bit_budget

clean:
	rm -rf $(VENV) build dist *.egg-info
