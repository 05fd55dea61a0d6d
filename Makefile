# `make` lists the targets. Everything runs in an environment of its own, made by `make setup`.

VENV ?= .venv
PYTHON ?= python3
# Any torch >= 2.11 will do; without a GPU, a CPU build of this one is enough.
TORCH ?= torch==2.13.0
JSON ?= build/attention_grid.json
RESULTS := benchmarks/results

READY := $(VENV)/.ready
PY := $(VENV)/bin/python
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
SANITIZER ?= $(or $(shell command -v compute-sanitizer),/usr/local/cuda/bin/compute-sanitizer)
CUDA_SOURCES = $(shell find kernels -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

define NEEDS_HOPPER
import sys, torch
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    sys.exit("gpu-check: expected a Hopper GPU (H100, H200), found none. Without one: make test")
endef
export PYTHON NEEDS_HOPPER

.PHONY: help setup demo test transformers-tests lint format kernels gpu-check results clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name what; do \
	  printf '  make %-18s %s\n' "$$name" "$$what"; done

setup: $(READY)  ## make the environment (TORCH='torch==2.13.0' PYTHON=python3 to choose)

$(READY): setup.py setup.cfg pyproject.toml tools/setup_venv.sh
	@tools/setup_venv.sh $(VENV) '$(TORCH)'
	@touch $@

demo: $(READY)  ## train a small GPT-2 for two minutes; on a GPU, GPT-2 small on the kernels
	@$(PY) examples/train_gpt2.py --demo

test: $(READY)  ## everything that needs no GPU
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 $(PY) -m pytest -n auto --maxprocesses 8

TRANSFORMERS ?= $(error expected TRANSFORMERS=folder, an unpacked source tree. Next step: see tools/transformers_tests.py)

transformers-tests:  ## Transformers' own attention tests on ours (TRANSFORMERS=its source tree)
	@mkdir -p build
	PYTHONPATH=. $(GPU_PY) tools/transformers_tests.py $(TRANSFORMERS) --json build/transformers_tests.json --page docs/transformers_tests.md

lint: $(READY)  ## ruff and clang-format
	@failed=0; \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	$(VENV)/bin/clang-format --dry-run --Werror $(CUDA_SOURCES) || failed=1; \
	exit $$failed

format: $(READY)  ## rewrite the sources as lint wants them
	@$(PY) -m ruff check --fix --exit-zero .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CUDA_SOURCES)

kernels: $(READY)  ## compile the library; what every unit costs and every kernel uses
	@mkdir -p build
	@$(PY) tools/kernel_report.py --json build/kernels.json

# The environment is optional here, for machines without a package index.
gpu-check:  ## on a Hopper GPU: correctness, sanitizers, benchmark grid (JSON=file)
	@$(GPU_PY) -c "$$NEEDS_HOPPER"
	$(GPU_PY) -m pytest tests/gpu
	@command -v $(SANITIZER) >/dev/null || { echo "gpu-check: expected compute-sanitizer of the CUDA" \
	  "toolkit, found no $(SANITIZER). Next step: make gpu-check SANITIZER=/path/to/it"; exit 1; }
	PYTHONPATH=. $(SANITIZER) --tool memcheck --error-exitcode 1 $(GPU_PY) tests/gpu/sanitizer_cases.py
	PYTHONPATH=. $(SANITIZER) --tool racecheck --error-exitcode 1 $(GPU_PY) tests/gpu/sanitizer_cases.py
	@mkdir -p $(dir $(JSON))
	PYTHONPATH=. $(GPU_PY) benchmarks/attention_grid.py --json $(JSON)

results:  ## on a Hopper GPU: the JSON files in benchmarks/results, the plot and README's tables
	PYTHONPATH=. $(GPU_PY) benchmarks/attention_grid.py --head-dims 64 128 256 --deterministic --json $(RESULTS)/attention_grid.json
	PYTHONPATH=. $(GPU_PY) benchmarks/attention_grid.py --head-dims 32 96 192 --dropouts 0 --json $(RESULTS)/attention_grid_more.json
	PYTHONPATH=. $(GPU_PY) benchmarks/attention_grid.py --head-dims 32 64 96 128 --seqlens 128 192 256 384 --deterministic --json $(RESULTS)/attention_grid_short.json
	PYTHONPATH=. $(GPU_PY) benchmarks/limits.py --json $(RESULTS)/limits.json
	PYTHONPATH=. $(GPU_PY) benchmarks/host_overhead.py --json $(RESULTS)/host_overhead.json
	PYTHONPATH=. $(GPU_PY) benchmarks/packed.py --json $(RESULTS)/packed.json
	PYTHONPATH=. $(GPU_PY) benchmarks/packed.py --dropout 0.1 --json $(RESULTS)/packed_dropout.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --steps 30 --overlay-steps 300 --json $(RESULTS)/training_step.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --models gpt2 --contexts 512,1024,2048,4096,8192 --compile both --tokens 16384 --json $(RESULTS)/gpt2_grid_small.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --models gpt2-medium --contexts 512,1024,2048,4096,8192 --compile both --tokens 16384 --json $(RESULTS)/gpt2_grid_medium.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --models bert-large-half --attention eager,sdpa,hf_flashattn,hf_flashattn_unpad,hf_flashattn_flat --json $(RESULTS)/bert_large_half.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --models bert-large-half --compile both --warmup 25 --attention eager,sdpa,hf_flashattn_flat,hf_flashattn_flat_graphs --json $(RESULTS)/bert_large_compiled_half.json
	PYTHONPATH=. $(GPU_PY) benchmarks/training_step.py --models bert-large-full --compile both --json $(RESULTS)/bert_large_compiled_full.json
	PYTHONPATH=. $(GPU_PY) benchmarks/memory.py --json $(RESULTS)/memory.json
	PYTHONPATH=. $(GPU_PY) benchmarks/step_parts.py --json $(RESULTS)/step_parts.json
	PYTHONPATH=. $(GPU_PY) docs/results.py
	PYTHONPATH=. $(GPU_PY) docs/tables.py --grid $(RESULTS)/attention_grid.json --steps $(RESULTS)/gpt2_grid_small.json $(RESULTS)/gpt2_grid_medium.json $(RESULTS)/bert_large_half.json $(RESULTS)/bert_large_compiled_half.json
	PYTHONPATH=. $(GPU_PY) benchmarks/plot_steps.py $(RESULTS)/gpt2_grid_small.json $(RESULTS)/gpt2_grid_medium.json --output $(RESULTS)/gpt2_grid.png
	PYTHONPATH=. $(GPU_PY) benchmarks/plot_grid.py $(RESULTS)/attention_grid.json
	PYTHONPATH=. $(GPU_PY) examples/plots.py $(RESULTS)/training_step.json --out $(RESULTS)/loss_overlay.png
	PYTHONPATH=. $(GPU_PY) benchmarks/plot_grid.py $(RESULTS)/attention_grid_more.json
	PYTHONPATH=. $(GPU_PY) benchmarks/plot_grid.py $(RESULTS)/attention_grid_short.json

clean:  ## remove what builds and tools left (not .venv, not the kernel cache)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
