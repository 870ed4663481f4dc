PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-slow test-gpu mutate check clean

train: $(READY)
	$(BIN)/python -m recipes.train experiment=bytes_gpt

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m "gpu or not slow" tests/ops

mutate: $(READY)
	$(BIN)/python tests/ops/mutate.py --jobs $$(nproc)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not integration and not thorough"

clean:
	rm -rf $(VENV) dist

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"lq needs Python 3.11 or newer, {sys.executable} is {v}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
