# Targets for users (demo) and contributors. Everything runs in .venv, which the first target that needs it sets up.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
COUNT ?= 5000
SEED ?= 0
SECTION ?= files

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint browser-setup test-zoo zoo-setup bench bench-setup fuzz fuzz-inputs mutations replay clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F': ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# A stamp newer than what it was made from; an interrupted set-up leaves none and starts again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: torchshear needs Python 3.11 or later, but '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>/dev/null || echo missing). Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot make virtual environments." \
			"Install its venv package, on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv: takes some minutes the first time."
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(PIP) -e '.[demo,test]'
	@touch $@

.venv/.zoo: .venv/.installed
	@echo "Adding torchvision, timm, transformers, ultralytics, diffusers and others, and what trains their models."
	@$(PIP) pillow transformers accelerate peft lightning einops ftfy importlib_metadata regex requests
	@$(PIP) --no-deps torchvision timm ultralytics opencv-python-headless \
		diffusers segmentation-models-pytorch monai open_clip_torch
	@touch $@

.venv/.bench: .venv/.zoo
	@echo "Adding torch-pruning."
	@$(PIP) -e '.[bench]'
	@touch $@

setup: .venv/.installed ## make .venv with pinned versions

zoo-setup: .venv/.zoo ## add the libraries of the zoo to .venv, without the torch that torchvision would bring

bench-setup: .venv/.bench ## add what benchmarks compare with

demo: setup ## train, prune, prove, export and measure on real digits; results in out/demo
	@$(BIN)/python examples/digits_demo.py

lint: setup ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser-setup: ## install Chromium for the tests of the page, where there is apt-get and it may (root)
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && echo "Installing Chromium." && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	then :; \
	else \
		echo "No browser, and none can be installed here: the tests of the page that need one are skipped." \
			"On Debian and Ubuntu: sudo apt-get install chromium"; \
	fi

test: lint ## lint, then the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not zoo and not gpu"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reading.py

coverage: setup ## the default test suite once more, with the lines and branches that it reaches; takes twice as long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not zoo and not gpu" \
		--cov=torchshear --cov-report=term:skip-covered --cov-fail-under=96

test-zoo: zoo-setup ## named architectures of torchvision, timm, transformers and others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m zoo

bench: bench-setup ## planning time against Torch-Pruning
	$(BIN)/python benchmarks/planning.py

fuzz: setup ## random networks, cut at random: make fuzz COUNT=5000 SEED=0
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --count $(COUNT) --seed $(SEED)

fuzz-inputs: setup ## inputs that are wrong in every way: make fuzz-inputs SECTION=calls COUNT=20000
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz_inputs.py --section $(SECTION) --count $(COUNT) --seed $(SEED)

mutations: setup ## make every operator rule wrong, and see prune notice
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutations.py

replay: zoo-setup ## replay the plans of the whole zoo on fresh models
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/replay.py --write

clean: ## remove .venv, results and caches
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
