# make install | test | test-gpu | quality | fuzz | demo | serve | bench | bench-gpu | parity | cost | plots | clean
VLLM_VERSION ?= 0.32.0
VENV ?= .venv
OLDER_VLLM_VERSION ?= 0.31.0
OLDER_VENV ?= .venv31
PYTHON ?= python3
ARGS ?=
FUZZ_EXAMPLES ?= 20000
# For the kernels on a GPU: any Python with torch, triton, numpy, numba, tqdm, pytest and pytest-timeout. vLLM isn't needed.
GPU_PYTHON ?= python3

STAMP := $(VENV)/.installed-$(VLLM_VERSION)
INSTALL_INPUTS := pyproject.toml scripts/install.sh $(wildcard packaging/vllm-alias/*)
RUN := $(VENV)/bin/python
SAMPLER_TESTS := tests/integration/test_patches.py tests/integration/test_cpu_mends.py
# vLLM's V2 model runner works without a GPU where Triton interprets its kernels and has a backend that is called cpu.
# A target of two ranks runs on V1 with the older vLLM, on V2 with the newer.
V2_TESTS := tests/integration/test_v2.py tests/integration/test_target_ranks.py
# What the benchmarks serve, and what only Ray can fail, is run with the newer vLLM alone.
NEWER_TESTS := $(addprefix tests/integration/, test_scripted.py test_data_parallel.py test_draft_on_ranks.py test_host.py \
	test_v2.py test_starts.py test_draft_found.py test_differential.py)
INTERPRETED := TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/tests/integration/interpreted

.PHONY: install install-older test test-engines test-rest test-gpu quality fuzz demo serve bench bench-gpu parity cost plots clean

install: $(STAMP)

$(STAMP): $(INSTALL_INPUTS)
	@VENV=$(VENV) VLLM_VERSION=$(VLLM_VERSION) PYTHON=$(PYTHON) scripts/install.sh

install-older:
	@$(MAKE) --no-print-directory install VENV=$(OLDER_VENV) VLLM_VERSION=$(OLDER_VLLM_VERSION)

# Everything that needs no GPU. Tests that run vLLM's code have processes of their own: vLLM looks into all modules that others
# have imported. So have the kernels: triton's interpreter is chosen for a whole process. ARGS goes to pytest. Starting an engine
# is mostly work of one core: what needs no engine runs beside those tests, and gives way to them.
test: install install-older
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line test-engines test-rest

test-engines:
	$(OLDER_VENV)/bin/python -m pytest tests/integration $(SAMPLER_TESTS:%=--ignore=%) $(NEWER_TESTS:%=--ignore=%) $(ARGS)
	$(RUN) -m pytest tests/integration tests/chaos $(SAMPLER_TESTS:%=--ignore=%) $(V2_TESTS:%=--ignore=%) $(ARGS)
	$(INTERPRETED) $(RUN) -m pytest $(V2_TESTS) $(ARGS)

test-rest:
	nice -n 19 $(OLDER_VENV)/bin/python -m pytest $(SAMPLER_TESTS) $(ARGS)
	nice -n 19 $(RUN) -m pytest $(SAMPLER_TESTS) $(ARGS)
	nice -n 19 $(RUN) -m pytest tests/parity $(ARGS)
	$(INTERPRETED) nice -n 19 $(RUN) -m pytest tests/parity/test_v2_sampler_lossless.py $(ARGS)
	TRITON_INTERPRET=1 nice -n 19 $(RUN) -m pytest kernels/tests $(ARGS)
	nice -n 19 $(RUN) -m pytest tests/unit tests/property $(ARGS)

# The kernels compiled, each 100 times bit for bit, and draft steps as CUDA graphs; then the kernels under compute-sanitizer,
# where it is installed.
test-gpu:
	@$(GPU_PYTHON) -c 'import torch' 2>/dev/null || { echo 'make test-gpu: $(GPU_PYTHON) has no torch' >&2; exit 1; }
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch finds no GPU here")'
	$(GPU_PYTHON) -m pytest kernels/tests tests/unit/test_draft_graphs.py $(ARGS)
	@if command -v compute-sanitizer; then for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
			$(GPU_PYTHON) -m pytest kernels/tests/test_repetition.py --timeout=0 || exit 1; done; \
	else echo 'compute-sanitizer is not installed: not run'; fi

quality: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The state machine of both sides, for as many examples as it takes to find what `make test` does not.
fuzz: install
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(RUN) -m pytest tests/property/test_two_sides.py --timeout=0 $(ARGS)

# Serves with and without double, streams the same prompts through both, compares speed and text.
demo: install
	@$(RUN) -m benchmarks.demo $(ARGS)

# The double server on the bundled pair, in the foreground.
serve: install
	@$(RUN) -m benchmarks.serve $(ARGS)

# ARGS: see `python -m benchmarks.run --help`.
bench: install
	@$(RUN) -m benchmarks.run $(ARGS)

# The kernels against their references, against torch's own operators, and against what the device can do.
bench-gpu:
	@$(GPU_PYTHON) -m benchmarks.kernel_bench $(ARGS)

# Greedy text of double and of plain vLLM, token by token.
parity: install
	@$(RUN) -m benchmarks.parity $(ARGS)

# Step time of the plain target by number of layers, for choosing C.
cost: install
	@$(RUN) -m benchmarks.cost $(ARGS)

plots: install
	@$(RUN) -c 'import matplotlib' 2>/dev/null || $(VENV)/bin/pip install --quiet 'matplotlib>=3.8'
	@$(RUN) -m benchmarks.plots $(ARGS)

clean:
	rm -rf $(VENV) $(OLDER_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
