# make setup   a .venv with everything
# make demo    recordings -> tokens -> a trained model -> a sample, on real speech
# make test    the tests
# make test-fast   those for the inner loop, in a minute and a half
# make check   formatting, lint, types, imports between rooms
# make benchmarks   csm_fast against what others train with (20 minutes), and README's tables from that

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux the default index serves CUDA builds, which run on a CPU too but are large. TORCH_INDEX takes the address
# of PyTorch's CPU wheels (pytorch.org tells it) instead.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

DATA ?=
CODEC ?= offline
DEMO := demo

.PHONY: setup demo test test-fast check benchmarks clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py Makefile
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; install Python 3.10 to 3.13, or say make setup PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: this is Python {v[0]}.{v[1]}; csm_fast needs 3.10 to 3.13: make setup PYTHON=python3.12")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: Python's venv module is missing; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 2; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "error: no C compiler; install one (Debian, Ubuntu: apt-get install build-essential)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) -e '.[dev,qlora]'
	# Meta's package carries the Llama-3 tokenizer; its other requirements are not needed for that.
	$(PIP) --no-deps llama-models
	$(PIP) einops sphn sentencepiece sounddevice==0.5 aiohttp
	# moshi pins older versions of torch and others than it needs for Mimi. Last, so that pip does not warn about them.
	$(PIP) --no-deps moshi==0.2.13
	@touch $@
	@echo "ready: $(BIN)/csm-fast and $(BIN)/csm-fast-train (make demo tries them)"

# The main job, each step a command that works on your own data too. DATA=metadata.json takes the place of the
# recordings; CODEC=transformers uses kyutai/mimi where the hub can be reached.
demo: setup
	$(if $(DATA),,$(BIN)/python -m csm_fast.data.demo $(DEMO)/speech)
	$(BIN)/csm-fast pretokenize --train-data $(or $(DATA),$(DEMO)/speech/metadata.json) --val-fraction 0.1 \
		--codec $(CODEC) --output $(DEMO)/tokens
	$(BIN)/csm-fast-train --config configs/demo.yaml --data $(DEMO)/tokens --output-dir $(DEMO)/run
	$(BIN)/csm-fast generate --model $(DEMO)/run/best --text "Please try again later." --codec $(CODEC) --out $(DEMO)/sample.wav
	@echo
	@echo "report of the data   $(DEMO)/tokens/report.json"
	@echo "tuned model          $(DEMO)/run/best (model.safetensors, config.json)"
	@echo "metrics and plot     $(DEMO)/run/metrics.jsonl, $(DEMO)/run/loss.png"
	@echo "sample               $(DEMO)/sample.wav"

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The 568 recordings of the same speaker that the demo takes most of. Sesame's own code where its clones are named.
SESAME_CSM ?=
SESAME_FINETUNE ?=
COMPARE = $(BIN)/python -m benchmarks.compare --data $(DEMO)/corpus-tokens --results benchmarks/results/compare.jsonl \
	$(if $(SESAME_CSM),--sesame-csm $(SESAME_CSM)) $(if $(SESAME_FINETUNE),--sesame-finetune $(SESAME_FINETUNE))
BLOG = $(if $(and $(SESAME_CSM),$(SESAME_FINETUNE)),blog,padded)
# Without products of bf16 csm-1b takes the published forward minutes a pass.
HAS_BF16 := $(shell grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo yes)
MIDDLE = $(if $(HAS_BF16),16,8)

benchmarks: setup
	$(BIN)/python -m csm_fast.data.demo $(DEMO)/corpus --sounds
	$(BIN)/csm-fast pretokenize --train-data $(DEMO)/corpus/metadata.json --codec offline --output $(DEMO)/corpus-tokens
	$(COMPARE) --repeats 3
	$(COMPARE) --checkpointing --memory-only --systems csm_fast $(if $(HAS_BF16),,csm_fast-fp32) transformers
	$(COMPARE) --shape csm-1b --middle $(MIDDLE) --batches $(MIDDLE) --systems csm_fast $(if $(HAS_BF16),$(BLOG)) \
		--no-optimizer
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(DEMO) build dist *.egg-info
