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

QUALITY := $(BIN)/python -W ignore::FutureWarning -m tests.quality

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

# Four tables, each of which can be asked for alone; two at once, and each printed when it is whole.
QUALITY_PARTS := quality-recipes quality-dense quality-packed quality-bits
.PHONY: $(QUALITY_PARTS)

quality: $(STAMP)
	$(MAKE) --jobs 2 --output-sync=target $(QUALITY_PARTS)

quality-recipes: $(STAMP)
	$(QUALITY)

quality-dense: $(STAMP)
	$(QUALITY).dense_to_moe

quality-packed: $(STAMP)
	$(QUALITY).packed_experts

quality-bits: $(STAMP)
	$(QUALITY).bit_budget

clean:
	rm -rf $(VENV) build dist *.egg-info
