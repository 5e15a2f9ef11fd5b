# For GNU make on Linux. Every target first sets up what it needs, in .venv; `make` lists them all.

PYTHON ?= python3
DATASET ?= shapes
OUTPUT ?= output/demo
# More arguments for the tool that does a target's work (in `demo`, the training), such as OPTS="SOLVER.MAX_ITER 20".
OPTS ?=
# What pip installs as detectron2 instead of the wheel in requirements-detectron2.txt.
DETECTRON2 ?=

# How pytest shares the tests among processes: each file in one, in the order of tests/conftest.py.
PARALLEL ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Relative, as all else here: the clone's own path may have spaces in it.
SITE_PACKAGES = $(shell $(BIN)/python -c \
	'import os, sysconfig; print(os.path.relpath(sysconfig.get_path("purelib")))')
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	--custom-compile-command 'make lock'
CSRC := $(shell find csrc -type f)
CXX_SOURCES := $(CSRC) $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
OPERATORS := dk_detectron/_C.abi3.so

ifeq ($(filter shapes trees,$(DATASET)),)
$(error DATASET must be shapes or trees, got '$(DATASET)': make demo DATASET=shapes)
endif

.PHONY: help setup demo test fuzz sanitize ptx mutants costs lint format lock clean distclean FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(OPERATORS) .venv/.detectron2 ## Install everything into .venv and compile the operators

demo: setup ## Train on DATASET (shapes or trees) and draw the results, into OUTPUT
	$(BIN)/python tools/prepare_$(DATASET).py
	$(BIN)/python tools/train_net.py --resume \
		--config-file configs/demo/$(DATASET)_MNV2_FPN_dk_l3.yaml \
		OUTPUT_DIR $(OUTPUT) $(OPTS)
	$(BIN)/python tools/visualize_results.py --config-file $(OUTPUT)/config.yaml
	$(BIN)/python tools/report.py $(OUTPUT)

test: setup ## Run the tests
	$(BIN)/python -m pytest $(PARALLEL) --durations 30 $(OPTS)

fuzz: setup ## Try thousands of strange files and arguments (a part of `make test`)
	$(BIN)/python -m pytest tests/test_data_fuzz.py tests/test_weights_fuzz.py \
		tests/test_evaluation_fuzz.py tests/test_model_zoo_fuzz.py tests/test_ops_fuzz.py \
		--hypothesis-profile=fuzz -s $(OPTS)

sanitize: setup ## Run all kernels on the CPU under AddressSanitizer, UBSan and ThreadSanitizer
	PYTHON=$(BIN)/python tests/sanitize.sh

ptx: setup ## Run what nvcc makes of the CUDA kernels, without a GPU (a part of `make test`)
	DK_TEST_PTX=1 $(BIN)/python -m pytest tests/test_csrc_ptx.py tests/test_ptx_machine.py \
		tests/test_ptx_costs.py $(OPTS)

mutants: setup ## Plant small faults in csrc and ops and count how many the tests see (hours)
	PYTHONPATH=tests $(BIN)/python -m mutation $(OPTS)

costs: setup ## Print what the CUDA kernels cost, counted on their PTX
	PYTHONPATH=tests $(BIN)/python -m ptx.costs

lint: .venv/.requirements ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: .venv/.requirements ## Correct style and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

lock: .venv/.requirements ## Pin the dependencies anew (OPTS=--upgrade: to their newest versions)
	printf '%s\n' 'setuptools<82' wheel | $(LOCK) $(OPTS) -o requirements-build.txt -
	$(LOCK) $(OPTS) -c requirements-build.txt -o requirements.txt pyproject.toml requirements.in

clean: ## Remove what was compiled, and caches
	rm -rf build dist *.egg-info dk_detectron/_C*.so .pytest_cache .ruff_cache .mypy_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf .venv

# Each file below appears last in its step, so that an interrupted step starts anew.

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: expected Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version):" \
			"install one and name it, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "error: $(PYTHON) cannot make virtual environments: install its module venv" \
			"(on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
	@echo '#include <Python.h>' | $(CXX) -std=c++17 -fsyntax-only -x c++ - \
		-I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" || { \
		echo "error: $(CXX) cannot compile C++17 with the headers of $(PYTHON): install both" \
			"(on Debian and Ubuntu the packages g++ and python3-dev)," \
			"or name another compiler, as in make CC=clang CXX=clang++" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

# Some dependencies come as sources only. Without build isolation, what builds them is pinned too.
# The .pth file does what `pip install -e .` would, without compiling the operators a second time.
.venv/.requirements: requirements-build.txt requirements.txt | $(BIN)/pip
	$(PIP) install --require-hashes -r requirements-build.txt
	$(PIP) install --require-hashes --no-build-isolation -r requirements.txt
	echo '$(CURDIR)' > $(SITE_PACKAGES)/dk_detectron.pth
	touch $@

# The wheel works in any Python once pip is told that this is the one on its tag (its compiled part
# does not load and is not needed). A detectron2 that is there already is left alone.
# All of them also bring a package `tools`, which would hide the folder of that name here.
.venv/.detectron2: requirements-detectron2.txt $(if $(DETECTRON2),FORCE) | .venv/.requirements
ifeq ($(DETECTRON2),)
	$(BIN)/python -c 'import detectron2' 2> /dev/null || \
		$(PIP) install --require-hashes -r requirements-detectron2.txt --no-deps --upgrade \
			--target $(SITE_PACKAGES) --python-version 3.10 --platform linux_x86_64 \
			--only-binary=:all:
else
	$(PIP) uninstall --yes sal-detectron2
	$(PIP) install --no-deps --no-build-isolation '$(DETECTRON2)'
endif
	rm -rf $(SITE_PACKAGES)/tools
	touch $@

$(OPERATORS): setup.py $(CSRC) .venv/.requirements
	$(BIN)/python setup.py build_ext --inplace
