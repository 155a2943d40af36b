# `make` shows what there is. Everything runs in .venv, which scripts/setup.sh builds once and then leaves alone.

CONFIG ?= cpu
LAUNCH ?= single
NPROC ?= 1
ARGS ?=
MODEL ?=

PYTHON_IN_VENV := .venv/bin/python
# What only reads this repository works before the set-up too.
ANY_PYTHON = $(or $(wildcard $(PYTHON_IN_VENV)),$(PYTHON),python3)
LAUNCHER := -m recipes.common.launch
RECIPES := $(filter-out __init__,$(basename $(notdir $(filter-out recipes/common/%,$(wildcard recipes/*/*.py)))))
TARGETS := help setup setup-dev setup-distributed list quickstart chat test test-fast bench peft-comparison alignment-comparison results notebooks lint clean
ON_GPU := $(firstword $(wildcard /dev/nvidia0 /dev/kfd /dev/dxg))

# The tests' processes have one thread each. A file stays in one process, since its tests share what they have trained.
PYTEST := $(PYTHON_IN_VENV) -m pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: $(TARGETS) $(RECIPES)
.NOTPARALLEL:

help:
	@echo "make setup         build .venv and install the pinned stack (done by every target below when needed)"
	@echo "make quickstart    raw text to an aligned model: tokenizer, llama, full, reward_model, ppo, report; offline"
	@echo "make chat          talk to it; MODEL=<folder or hub id> talks to another"
	@echo "make list          every recipe, one line each"
	@echo "make <recipe>      run one: CONFIG=cpu|gpu|cluster|<file> LAUNCH=<launcher> NPROC=<processes> ARGS=\"--section.key value\""
	@echo "                   launchers: single ddp fsdp zero1 zero2 zero3 zero2_offload zero3_offload"
	@echo "make test          all tests; test-fast: those that take seconds; ARGS=\"-k words\" picks some"
	@echo "make bench         measure ours against its peers; results: the tables of RESULTS.md; notebooks: execute them again"
	@echo "make peft-comparison        each fine-tuning method beside full fine-tuning: score, size, memory, time; ARGS=\"--seeds 1\""
	@echo "make alignment-comparison   SFT, best-of-n, DPO, PPO, GRPO from one model, scored by the true checker; ARGS=\"--seeds 1\""
	@echo "make lint          ruff and mypy"
	@echo "make clean         delete caches (runs/ and .venv stay)"
	@echo
	@echo "PYTHON=python3.12 picks the interpreter that .venv is built with. Every recipe also takes --help, --print-config, --dry-run."

setup:
	@PYTHON='$(PYTHON)' scripts/setup.sh base
setup-dev:
	@PYTHON='$(PYTHON)' scripts/setup.sh dev
setup-distributed:
	@PYTHON='$(PYTHON)' scripts/setup.sh distributed

list:
	@$(ANY_PYTHON) $(LAUNCHER) --list

$(RECIPES): $(if $(and $(filter zero%,$(LAUNCH)),$(ON_GPU)),setup-distributed,setup)
	@$(PYTHON_IN_VENV) $(LAUNCHER) $@ --config '$(CONFIG)' --launch '$(LAUNCH)' --nproc '$(NPROC)' -- $(ARGS)

quickstart: setup
	@$(PYTHON_IN_VENV) scripts/quickstart.py $(ARGS)
chat: setup
	@$(PYTHON_IN_VENV) scripts/chat.py $(if $(MODEL),'$(MODEL)') $(ARGS)

test: setup-dev setup-distributed
	@$(PYTEST) $(ARGS)
test-fast: setup-dev setup-distributed
	@$(PYTEST) -m "not slow" $(ARGS)

bench: setup
	@$(PYTHON_IN_VENV) scripts/bench.py $(ARGS)
peft-comparison: setup
	@$(PYTHON_IN_VENV) scripts/peft_comparison.py $(ARGS)
alignment-comparison: setup
	@$(PYTHON_IN_VENV) scripts/alignment_comparison.py $(ARGS)
results: setup
	@$(PYTHON_IN_VENV) scripts/results.py $(ARGS)
notebooks: export PYTHONWARNINGS = ignore
notebooks: setup
	@$(PYTHON_IN_VENV) -m jupyter execute --inplace notebooks/*.ipynb

lint: setup-dev
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m mypy recipes/common

clean:
	@find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Any other word is most likely a misspelt recipe or target.
.DEFAULT:
	@$(ANY_PYTHON) $(LAUNCHER) '$@' --targets '$(TARGETS)'
Makefile: ;
