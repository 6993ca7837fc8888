# make train    set up and train the quick-start experiment
# make test     set up and run the tests, under 10 minutes on 2 cores
# make test-all the same with the long ones
# make check    lint and types
# make check-npu  the recorded schemas of torch-npu against its wheel, which pip fetches; needs gcc, no NPU
# make bench    benchmarks, by hand
# make docs     the documentation's site, in build/site; a warning is an error
# make links    build/path/twinmoe/*: for type checkers and editors
#
# VENV=DIR puts the environment elsewhere; VENV=0 uses the current one, for containers with a stack of their own.
VENV ?= .venv
PYTHON ?= python3
FOLDERS = moe_core backends cuda ascend configs
PYTEST_ARGS ?=
TRAIN_ARGS ?=
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifeq ($(VENV),0)
PY = $(PYTHON)
BASE = installed
DEV = installed
else
PY = $(VENV)/bin/python
BASE = $(VENV)/base.done
DEV = $(VENV)/dev.done
endif
TWINMOE = $(PY) -m twinmoe.moe_core.cli
PIP = $(PY) -m pip install -q -c constraints.txt

.PHONY: train test test-all check check-npu docs bench links installed
train: $(BASE)
	@extra=$$($(TWINMOE) doctor --json | $(PY) -c "import json, sys; print(json.load(sys.stdin)['extra'] or '')"); \
	if [ "$(VENV)" != 0 ] && [ -n "$$extra" ]; then echo "installing the extra $$extra"; $(PIP) -e ".[$$extra]"; fi
	$(TWINMOE) doctor
	$(TWINMOE) train quickstart $(TRAIN_ARGS)

test: $(DEV)
	$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

test-all: $(DEV)
	$(PY) -m pytest -q --hypothesis-profile=searching -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(DEV) links
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$(command -v $(PY))"

check-npu: $(DEV)
	$(PY) tests/ascend/torch_npu/check_wheel.py

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(DEV)
	$(PY) tests/bench/bench_quickstart.py
	$(TWINMOE) bench router
	$(TWINMOE) bench planner
	$(TWINMOE) bench comm
	@if $(TWINMOE) doctor | grep -q "^cuda  *works"; then $(PY) tests/bench/bench_cuda_layer.py --quick; fi

links:
	@mkdir -p build/path/twinmoe
	@for d in $(FOLDERS); do ln -sfn ../../../$$d build/path/twinmoe/$$d; done
	@ln -sfn ../../../tests build/path/twinmoe/testing

installed:
	@$(PY) -c "import twinmoe.moe_core" 2>/dev/null || $(PY) -m pip install -q -e .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: on its own pip takes the build that fits the machine
$(VENV)/base.done: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e .
	@touch $@

# a torch for GPUs brings the triton that it needs, one for CPUs brings none
$(VENV)/dev.done: $(VENV)/base.done
	$(PY) -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0
	$(PIP) -e ".[dev,ascend,cuda,hf,report]"
	@touch $@
