# make install | test | quality | fuzz | demo | serve | bench | parity | cost | plots | clean
VLLM_VERSION ?= 0.32.0
VENV ?= .venv
OLDER_VLLM_VERSION ?= 0.31.0
OLDER_VENV ?= .venv31
PYTHON ?= python3
ARGS ?=
FUZZ_EXAMPLES ?= 20000

STAMP := $(VENV)/.installed-$(VLLM_VERSION)
INSTALL_INPUTS := pyproject.toml scripts/install.sh $(wildcard packaging/vllm-alias/*)
RUN := $(VENV)/bin/python
SAMPLER_TESTS := tests/integration/test_patches.py tests/integration/test_cpu_mends.py
# What the benchmarks serve; they run on the newer version.
BENCH_TESTS := tests/integration/test_scripted.py
# vLLM's V2 model runner works without a GPU where Triton interprets its kernels and has a backend that is called cpu.
V2_TESTS := tests/integration/test_v2.py
INTERPRETED := TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/tests/integration/interpreted

.PHONY: install install-older test quality fuzz demo serve bench parity cost plots clean

install: $(STAMP)

$(STAMP): $(INSTALL_INPUTS)
	@VENV=$(VENV) VLLM_VERSION=$(VLLM_VERSION) PYTHON=$(PYTHON) scripts/install.sh

install-older:
	@$(MAKE) --no-print-directory install VENV=$(OLDER_VENV) VLLM_VERSION=$(OLDER_VLLM_VERSION)

# Everything that needs no GPU. Tests that run vLLM's code have processes of their own: vLLM looks into all modules that others
# have imported. ARGS goes to pytest.
test: install install-older
	$(OLDER_VENV)/bin/python -m pytest $(SAMPLER_TESTS) $(ARGS)
	$(OLDER_VENV)/bin/python -m pytest tests/integration $(SAMPLER_TESTS:%=--ignore=%) $(BENCH_TESTS:%=--ignore=%) $(V2_TESTS:%=--ignore=%) $(ARGS)
	$(RUN) -m pytest $(SAMPLER_TESTS) $(ARGS)
	$(RUN) -m pytest tests/parity $(ARGS)
	$(RUN) -m pytest tests/integration tests/chaos $(SAMPLER_TESTS:%=--ignore=%) $(V2_TESTS:%=--ignore=%) $(ARGS)
	$(INTERPRETED) $(RUN) -m pytest $(V2_TESTS) $(ARGS)
	$(RUN) -m pytest tests/unit tests/property kernels/tests $(ARGS)

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
