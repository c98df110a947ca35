# For a fresh Debian 12, as root: make demo, make test, make matrix, make mutants. Each sets the checkout up first (see bootstrap).
# Tools are run as `python -m`: their scripts in .venv/bin name the folder that they were installed in, and so cannot move.

PYTHON := .venv/bin/python
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
MUTANTS ?=
KERNELS ?=
MATRIX_ARGS ?=
RUNS ?= 1000
SEED ?=

.DEFAULT_GOAL := help
.PHONY: help demo check source unit property test soak mutants matrix bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\): .*## /make \1: /p' $(MAKEFILE_LIST)

demo: ## set up, then trace every lab scenario that this host can run; DEMO_ARGS='-o DIR'
	@./bootstrap demo 'make demo'
	@.venv/bin/kvmreq demo $(DEMO_ARGS)

check: ## set up, then what a change needs at once, in less than a minute: source, unit tests, property tests made quick
	@./bootstrap test 'make check'
	@$(MAKE) --no-print-directory --jobs=2 --output-sync source unit property

# Of check, two at a time. mypy takes 20 s where it has no cache.
source:
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy --no-error-summary

unit property:
	@$(PYTHON) -m pytest --quiet -m 'not live' --hypothesis-profile quick tests/$@

test: ## set up, then check and test the source; TEST_ARGS='-k NAME' goes to pytest
	@./bootstrap test 'make test'
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy --no-error-summary
	$(PYTHON) -m pytest $(TEST_ARGS)

soak: ## set up, then let random faults befall the recorder: a loss is never an all-clear; RUNS=100 SEED=23
	@./bootstrap test 'make soak'
	@$(PYTHON) -m tests.live.soak $(RUNS) $(SEED)

mutants: ## set up, then change each rule of the analysis a little: a test must notice; MUTANTS='analysis.rules.x_save*'
	@./bootstrap mutants 'make mutants'
	@$(PYTHON) -m tests.mutants $(MUTANTS)

matrix: ## set up, then try every engine on stock kernels in QEMU; KERNELS='5.10 7.3' MATRIX_ARGS='--engines kprobe'
	@./bootstrap matrix 'make matrix'
	@$(PYTHON) -m tests.matrix.suite $(KERNELS) $(MATRIX_ARGS)

bench: ## set up, then measure: a table in which each figure is a ratio from one run
	@./bootstrap test 'make bench'
	@$(PYTHON) -m bench $(BENCH_ARGS)

clean: ## remove .venv and what the tools cached, so that the next run sets up again
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name .cache -prune -o -name __pycache__ -type d -exec rm -rf {} +
