# Thin on purpose: an own virtual environment, one pip or one command each. `make` lists the targets.
# Stamp files in .venv remember what is done, so a second run takes seconds; changed sources are built again.
PYTHON ?= python3
TORCH ?= 2.13.0
TORCHES ?= 2.11.0 2.13.0 2.14.1
ARGS ?=
# Processes of make test: each takes 1 to 2 GB.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
GATE := PYTHONPATH=tests $(BIN)/python -m cuda_gate.gate
export PIP_ROOT_USER_ACTION := ignore

TORCH_STAMP := $(VENV)/.torch-$(TORCH)
BUILD_STAMP := $(VENV)/.build-$(TORCH)
# Folders too: their time changes when a file is added or removed.
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake)
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment get in each other's way
.PHONY: help train test bench lint format cuda cuda-all gpu wheel compat clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Options: ARGS='...' passes on to the command, TORCH=$(TORCH), PYTHON=$(PYTHON), WORKERS=$(WORKERS)"

train: $(BUILD_STAMP) ## train the course CNN on real digits, stock PyTorch beside deepops
	$(BIN)/deepops train $(ARGS)

# A worker takes whole files, in the order of tests/conftest.py: what they share is made once. Threads of OpenMP that
# spin while they wait would take the cores from the other workers.
test: $(BUILD_STAMP) $(VENV)/.test ## run all tests, in several processes
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(BUILD_STAMP) ## time everything; rewrites benchmarks/results/*.csv and the table in README.md
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: $(BUILD_STAMP) $(VENV)/.lint ## ruff, mypy --strict, clang-format, no raw CUDA in kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python tests/cuda_gate/lint.py

format: $(VENV)/.lint ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

cuda: $(BUILD_STAMP) $(VENV)/.test $(VENV)/.cuda ## compile the CUDA kernels, which needs no GPU, and check what became of them
	$(GATE) $(ARGS)
	CUDACXX=$$($(GATE) --find nvcc) DEEPOPS_CUDA=1 $(PIP) --no-build-isolation --no-deps --editable .
	DEEPOPS_CUDA=1 $(BIN)/python -m pytest -q tests/test_cuda_build.py

cuda-all: $(BUILD_STAMP) $(VENV)/.cuda ## the same checks for every architecture
	$(GATE) --all $(ARGS)

gpu: ## build for the NVIDIA GPU of this machine, test and time; with PYTHON=... that has torch and pybind11: offline
	@if $(PYTHON) -c 'import torch, pybind11' 2>/dev/null; then $(PYTHON) -m benchmarks.gpu $(ARGS); else \
		$(MAKE) $(BUILD_STAMP) $(VENV)/.test $(VENV)/.cuda && \
		PATH="$(abspath $(BIN)):$$PATH" CUDACXX=$$($(GATE) --find nvcc) $(BIN)/python -m benchmarks.gpu $(ARGS); fi

wheel: $(TORCH_STAMP) $(VENV)/.test ## build the wheel into dist/
	rm -rf dist build/lib.* build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation

compat: wheel ## test that one wheel in new environments with each of TORCHES
	PYTHON=$(BIN)/python WORKERS=$(WORKERS) .ci/compat dist/*.whl $(TORCHES)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info deepops/*.so

# One clear line for what is missing on this machine, before anything is downloaded.
NEED = { echo "make: missing: $(1)" >&2; exit 1; }
$(VENV)/.venv:
	@command -v $(PYTHON) >/dev/null || $(call NEED,$(PYTHON); on Debian: apt install python3 python3-venv python3-dev)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || $(call NEED,Python 3.10 or newer; choose one with PYTHON=...)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call NEED,the venv module of $(PYTHON); on Debian: apt install python3-venv)
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| $(call NEED,the headers of $(PYTHON); on Debian: apt install python3-dev)
	@command -v $${CXX:-c++} >/dev/null || $(call NEED,a C++20 compiler; on Debian: apt install g++)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1' # the first with --group
	@touch $@

$(TORCH_STAMP): $(VENV)/.venv
	@echo "installing torch $(TORCH) into $(VENV): a large download the first time"
	$(PIP) torch==$(TORCH)
	@rm -f $(VENV)/.torch-* && touch $@

$(BUILD_STAMP): $(TORCH_STAMP) $(SOURCES)
	@echo "building deepops: about a minute on two cores the first time"
	$(PIP) --group build
	$(PIP) --no-build-isolation --editable '.[cli]'
	@rm -f $(VENV)/.build-* && touch $@

$(VENV)/.test: $(VENV)/.venv pyproject.toml
	$(PIP) --group test --group build
	@touch $@

# A CUDA compiler of this machine is used if there is one.
$(VENV)/.cuda: $(VENV)/.venv pyproject.toml
	$(GATE) --find nvcc >/dev/null || $(PIP) --group nvcc
	$(GATE) --find nvdisasm >/dev/null || $(PIP) --group nvdisasm
	@touch $@

$(VENV)/.lint: $(VENV)/.venv pyproject.toml
	$(PIP) --group lint
	@touch $@
