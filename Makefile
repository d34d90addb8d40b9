# Everything a newcomer types. Each command makes the .venv and builds the libraries as needed.
# PYTHON=python3 make gpu-check uses the packages of that interpreter, as found, and installs nothing.

VENV := .venv
SYSTEM_PYTHON ?= python3
PYTHON ?= $(VENV)/bin/python
PACKAGES := torch triton numpy setuptools wheel cmake ninja pytest pytest-benchmark pytest-xdist hypothesis \
	scikit-learn scikit-image pillow tqdm

.PHONY: demo test build bench gpu-check info clean

demo: build
	$(PYTHON) -m examples.digits $(ARGS)

test: build
	bash tests/run_all.sh $(PYTHON)

build: $(VENV)/.built

info: build
	$(PYTHON) -m fastseg.info

bench: build
	$(PYTHON) -m benchmarks.run $(OPS) $(ARGS)

# For a GPU machine: no network, packages as found; results in $OUT (default build/gpu-check).
gpu-check:
	$(if $(wildcard $(PYTHON)),$(PYTHON),$(SYSTEM_PYTHON)) -m benchmarks.gpu_check $(OPS)

$(VENV)/.packages: constraints.txt
	$(SYSTEM_PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'fastseg needs Python 3.11 or newer'"
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(PACKAGES)
	touch $@

$(VENV)/.built: $(VENV)/.packages setup.py CMakeLists.txt pyproject.toml $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*.cu) \
		$(wildcard csrc/*/*)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build $(VENV) fastseg/*.so *.egg-info
