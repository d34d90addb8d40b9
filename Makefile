# The commands for development. Each makes the .venv and builds the libraries if needed.
# PYTHON=python3 make gpu-check uses the packages of that interpreter and installs nothing.

VENV := .venv
SYSTEM_PYTHON ?= python3
PYTHON ?= $(VENV)/bin/python
PACKAGES := torch triton numpy setuptools wheel cmake ninja pytest pytest-benchmark pytest-xdist hypothesis \
	scikit-learn scikit-image pillow tqdm matplotlib ruff clang-format mypy

# what `make demo` trains: fcn, segnet_basic or a network of fastseg.models; masks trains nothing
NET := fcn

# the version of torch for `make test-torch`, which has its own environment
VERSION := 2.11.0
TORCH_VENV = .venv-torch-$(VERSION)
TEST_PACKAGES := numpy 'setuptools>=77' wheel cmake ninja pytest pytest-xdist hypothesis

INTEROP_VENV := .venv-interop

.PHONY: format lint demo test test-torch test-interop build build-all bench gpu-check info clean

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu')

format: $(VENV)/.packages
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

lint: $(VENV)/.packages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

demo: build
	$(PYTHON) -m $(if $(filter masks,$(NET)),examples.masks,examples.digits --net $(NET)) $(ARGS)

test: build-all
	bash tests/run_all.sh $(PYTHON)

# The tests with another torch: make test-torch VERSION=2.11.0. Its libraries are in its environment, not in fastseg/.
test-torch: $(TORCH_VENV)/.packages
	FASTSEG_LEVELS=native $(TORCH_VENV)/bin/python setup.py build_ext --build-lib $(TORCH_VENV)/libraries
	$(TORCH_VENV)/bin/python -c "import torch; print('torch', torch.__version__)"
	OMP_NUM_THREADS=1 FASTSEG_LIBRARY_DIR=$(CURDIR)/$(TORCH_VENV)/libraries/fastseg $(TORCH_VENV)/bin/python -m pytest \
		tests/test_contract.py tests/test_transforms.py tests/ops tests/nn tests/test_accelerate.py \
		-q -n 2 --dist worksteal -m "not slow" $(ARGS)

$(TORCH_VENV)/.packages:
	$(SYSTEM_PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet torch==$(VERSION) $(TEST_PACKAGES)
	touch $@

# With the packages of tests/interop/requirements.txt, an environment of 5.5 GB: `make test` skips these tests.
# The library that `build` made for another torch works here: it uses the stable ABI only.
test-interop: build $(INTEROP_VENV)/.packages
	OMP_NUM_THREADS=1 $(INTEROP_VENV)/bin/python -m pytest tests/interop --nothing-skipped -q -n 2 --dist worksteal $(ARGS)

$(INTEROP_VENV)/.packages: tests/interop/requirements.txt
	$(SYSTEM_PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --requirement $< pytest pytest-xdist hypothesis
	touch $@

# build: the instruction level of this machine; build-all: every level, as `pip install` builds them.
build: $(VENV)/.built-native

build-all: $(VENV)/.built-all

info: build
	$(PYTHON) -m fastseg.info

bench: build
	$(PYTHON) -m benchmarks.run $(OPS) $(ARGS)

# For a GPU machine: no network, installed packages only; results in $OUT (default build/gpu-check).
gpu-check:
	$(if $(wildcard $(PYTHON)),$(PYTHON),$(SYSTEM_PYTHON)) -m benchmarks.gpu_check $(OPS) $(ARGS)

$(VENV)/.packages: constraints.txt
	$(SYSTEM_PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'fastseg needs Python 3.11 or newer'"
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(PACKAGES)
	touch $@

SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*.cu csrc/*/*)
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .

$(VENV)/.built-native: $(VENV)/.packages $(SOURCES)
	FASTSEG_LEVELS=native $(INSTALL)
	touch $@

$(VENV)/.built-all: $(VENV)/.packages $(SOURCES)
	$(INSTALL)
	touch $@ $(VENV)/.built-native

clean:
	rm -rf build $(VENV) .venv-torch-* $(INTEROP_VENV) fastseg/*.so *.egg-info
