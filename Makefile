# `make demo` and `make test` need nothing but Python 3.10+ and make: they install into .venv what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL ?= --numprocesses auto --dist worksteal
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test lint aot docs wheel release-check bench gpu-suite clean

$(VENV)/.installed: pyproject.toml constraints.txt esengine/__init__.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "esengine needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# improve the packaged small SANA-Sprint by ES, compare it with the base on held-out captions, draw with both
demo: $(VENV)/.installed
	$(BIN)/esengine env
	run=runs/demo-$$(date +%Y-%m-%d_%H-%M-%S) && \
	$(BIN)/esengine train --run-dir $$run && \
	$(BIN)/esengine render --run-dir $$run

# once as it is, and once with the Triton kernels in their interpreter; a process for each core, of one thread each
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels tests/models/test_sana_block.py tests/models/test_graphs_kernels.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint
	cp -r esengine build/lint/esengine && cp -r kernels models build/lint/esengine/
	cd build/lint && PYTHONPATH=. ../../$(BIN)/lint-imports --no-logo --no-cache ../../pyproject.toml

# compile every kernel without a GPU, under the newest and the oldest Triton supported, and judge the machine code
aot: $(VENV)/.installed $(VENV)/triton-oldest/.installed
	$(BIN)/python bench/aot.py --arch 90 80 100 --also $(VENV)/triton-oldest

$(VENV)/triton-oldest/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0
	touch $@

# the API reference from the docstrings; a warning or a broken link is an error
docs: $(VENV)/.installed
	rm -rf build/docs
	$(BIN)/python .ci/docs.py build/docs

# the sdist, and the wheel from it, in dist/; tools are those of constraints.txt, and files have the commit's date
wheel: $(VENV)/.installed
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build

# what must hold before a release: CONTRIBUTING.md
release-check: $(VENV)/.installed
	.ci/release-check $(BIN)

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-enable

# every speed figure at full size on a CUDA device, correctness first, within 8 minutes: a table, and JSON in bench/results
gpu-suite: $(VENV)/.installed
	$(BIN)/python bench/suite

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
